"""Pictures that the demo model learns from: one to four icons on a plain, parted or shaded background."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from .outlines import FILLINGS, NAMES, coverage, lightness

COLOURS = {
    "red": (222, 30, 38),
    "orange": (245, 130, 20),
    "yellow": (250, 215, 25),
    "green": (25, 160, 60),
    "cyan": (20, 190, 215),
    "blue": (30, 70, 220),
    "purple": (125, 40, 190),
    "pink": (245, 80, 165),
}
BACKGROUNDS = {
    "white": (247, 247, 247),
    "black": (18, 18, 20),
    "gray": (130, 132, 135),
    "beige": (240, 226, 198),
    "light blue": (196, 224, 246),
    "light green": (198, 228, 190),
}
KINDS = ("plain", "gradient", "horizon")
HORIZON = 0.62  # the height at which a horizon parts the picture, from its top
SIZES = {"small": 0.28, "large": 0.42}  # side of the icon's box over the geometric mean of the picture's sides
ROWS = ("top", "", "bottom")
COLUMNS = ("left", "", "right")
POSITIONS = {
    f"{row} {column}".strip() or "center": (r, c) for r, row in enumerate(ROWS) for c, column in enumerate(COLUMNS)
}
MOST_ITEMS = 4
HELD_OUT_EVERY = 8  # one in so many (shape, colour, position) triples is never drawn in training

_LIGHT, _DARK = 0.5, 0.48  # share of white in a filling's light parts, of the colour in an icon's dark ones
_GAP = 0.03  # least free space between two boxes, over the geometric mean of the picture's sides
_MARGIN = 0.045
_JITTER = 0.01
_FILLING_WEIGHTS = (3, 1, 1)
_KIND_WEIGHTS = (3, 1, 1)


@dataclass(frozen=True)
class Item:
    """One icon: names out of the tables above; dx, dy in [-1, 1] move it inside its position."""

    shape: str
    colour: str
    position: str
    size: str
    filling: str = "plain"
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Background:
    """One colour, or two of them: shaded from the top's to the bottom's, or parted at the horizon."""

    kind: str
    top: str
    bottom: str


@dataclass(frozen=True)
class Scene:
    """A background and the icons on it."""

    background: Background
    items: tuple[Item, ...]


def is_held_out(item: Item) -> bool:
    """True when this (shape, colour, position) is kept out of training; spread evenly over all three."""
    shape, colour = NAMES.index(item.shape), list(COLOURS).index(item.colour)
    row, column = POSITIONS[item.position]
    return (2 * shape + 3 * colour + 5 * (3 * row + column)) % HELD_OUT_EVERY == 0


def tones(colour: str) -> np.ndarray:
    """The colour of an icon, of its filling's light parts, and of its dark ones: (3, 3) float32, 0 to 255."""
    base = np.asarray(COLOURS[colour], np.float32)
    return np.stack([base, base + _LIGHT * (255 - base), base * _DARK])


def item_box(item: Item, height_px: int, width_px: int) -> tuple[float, float, float]:
    """Return (left, top, side) of the item's box in pixels."""
    mean_side = math.sqrt(height_px * width_px)
    side = SIZES[item.size] * item.scale * mean_side
    row, column = POSITIONS[item.position]

    def start(index: int, extent: int, shift: float) -> float:
        margin = _MARGIN * mean_side
        low, high = margin, extent - margin - side
        return low + (high - low) * index / 2 + shift * _JITTER * mean_side

    return start(column, width_px, item.dx), start(row, height_px, item.dy), side


def paint_background(background: Background, height_px: int, width_px: int) -> np.ndarray:
    """(height_px, width_px, 3) float32, 0 to 255."""
    top, bottom = (np.asarray(BACKGROUNDS[name], np.float32) for name in (background.top, background.bottom))
    y = (np.arange(height_px, dtype=np.float32) + 0.5) / height_px
    if background.kind == "horizon":
        y = np.clip((y - HORIZON) * height_px + 0.5, 0, 1)
    column = top + y[:, None] * (bottom - top)
    return np.repeat(column[:, None], width_px, axis=1)


def paint_icon(
    picture: np.ndarray, shape: str, box: tuple[float, float, float], palette: np.ndarray, filling: str = "plain"
) -> None:
    """Paint one icon over a float (h, w, 3) picture, in place. box: (left, top, side) in pixels; palette: `tones`."""
    parts, (rows, columns) = coverage(shape, *box, *picture.shape[:2])
    light = lightness(filling, *box, rows, columns)
    base = palette[0] + np.asarray(light)[..., None] * (palette[1] - palette[0])
    whole, dark = parts[..., :1], parts[..., 1:]
    region = picture[rows, columns]
    region += whole * (base - region) + dark * (palette[2] - base)


def draw_scene(scene: Scene, height_px: int = 128, width_px: int = 128) -> np.ndarray:
    """Draw the scene, antialiased. Returns (height_px, width_px, 3) uint8."""
    picture = paint_background(scene.background, height_px, width_px)
    for item in scene.items:
        paint_icon(picture, item.shape, item_box(item, height_px, width_px), tones(item.colour), item.filling)
    return (picture.clip(0, 255) + 0.5).astype(np.uint8)


def _fits(box: tuple, boxes: list[tuple], mean_side: float) -> bool:
    gap = _GAP * mean_side
    left, top, side = box
    right, bottom = left + side + gap, top + side + gap
    return all(right <= x or x + s + gap <= left or bottom <= y or y + s + gap <= top for x, y, s in boxes)


def random_background(rng: Random) -> Background:
    kind = rng.choices(KINDS, _KIND_WEIGHTS)[0]
    top = rng.choice(list(BACKGROUNDS))
    if kind == "plain":
        return Background(kind, top, top)
    return Background(kind, top, rng.choice([name for name in BACKGROUNDS if name != top]))


def _random_item(rng: Random, count: int, shapes: Sequence[str]) -> Item:
    # Three large icons seldom find room.
    size = rng.choice(list(SIZES)) if count < 3 else rng.choices(list(SIZES), (4, 1))[0]
    return Item(
        rng.choice(list(shapes)),
        rng.choice(list(COLOURS)),
        rng.choice(list(POSITIONS)),
        size,
        rng.choices(FILLINGS, _FILLING_WEIGHTS)[0],
        rng.uniform(-1, 1),
        rng.uniform(-1, 1),
        rng.uniform(0.98, 1.02),
    )


def random_scene(
    rng: Random,
    count: int,
    height_px: int = 128,
    width_px: int = 128,
    *,
    held_out: bool = False,
    shapes: Sequence[str] = NAMES,
    alike: float = 0.3,
) -> Scene:
    """Draw lots for a scene of `count` icons that do not touch.

    held_out: True takes only held-out triples, False never takes one. shapes: names to choose from.
    alike: the chance that an icon after the first takes over another's shape, colour, filling and size.
    """
    mean_side = math.sqrt(height_px * width_px)
    while True:
        items: list[Item] = []
        boxes: list[tuple] = []
        for _ in range(60):
            if len(items) == count:
                return Scene(random_background(rng), tuple(items))
            item = _random_item(rng, count, shapes)
            if items and rng.random() < alike:
                other = rng.choice(items)
                fields = (other.shape, other.colour, item.position, other.size, other.filling)
                item = Item(*fields, item.dx, item.dy, item.scale)
            box = item_box(item, height_px, width_px)
            free = item.position not in (other.position for other in items) and _fits(box, boxes, mean_side)
            if free and is_held_out(item) == held_out:
                items.append(item)
                boxes.append(box)
