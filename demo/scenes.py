"""Pictures that the demo model learns from: coloured shapes on a plain background, and captions for them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (225, 30, 35),
    "green": (30, 165, 50),
    "blue": (35, 65, 225),
    "yellow": (250, 220, 30),
    "purple": (175, 40, 205),
    "cyan": (40, 205, 225),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "pink": (250, 190, 205),
    "brown": (110, 70, 40),
}
TRAINED_SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.30, "large": 0.43}  # side of the shape's box over the geometric mean of the picture's sides
ROWS = ("top", "", "bottom")
COLUMNS = ("left", "", "right")
POSITIONS = {
    f"{row} {column}".strip() or "center": (r, c) for r, row in enumerate(ROWS) for c, column in enumerate(COLUMNS)
}
HELD_OUT_EVERY = 8  # one in so many (shape, colour, position) triples is never drawn in training

_SUPERSAMPLING = 4
_GAP = 0.03  # least free space between two boxes, over the geometric mean of the picture's sides
_MARGIN = 0.05
_JITTER = 0.01


@dataclass(frozen=True)
class Item:
    """One shape: names out of the tables above; dx, dy in [-1, 1] move it inside its position."""

    shape: str
    colour: str
    position: str
    size: str
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Scene:
    """A background's name and the shapes on it."""

    background: str
    items: tuple[Item, ...]


def _circle() -> list[tuple[float, float]]:
    return [(0.5 + 0.5 * math.cos(a), 0.5 + 0.5 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 72, endpoint=False)]


def _cross() -> list[tuple[float, float]]:
    a, b = 0.32, 0.68
    return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]


def _star() -> list[tuple[float, float]]:
    corners = []
    for k in range(10):
        radius = 0.5 if k % 2 == 0 else 0.22
        angle = math.pi * k / 5 - math.pi / 2
        corners.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return corners


def _heart() -> list[tuple[float, float]]:
    corners = []
    for a in np.linspace(0, 2 * math.pi, 72, endpoint=False):
        x = 16 * math.sin(a) ** 3
        y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        corners.append((0.5 + x / 32, 0.5 - (y + 2.5) / 30))
    return corners


# Corners inside the unit square, x to the right and y down. The last three are not in TRAINED_SHAPES.
OUTLINES = {
    "circle": _circle(),
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)],
    "cross": _cross(),
    "star": _star(),
    "heart": _heart(),
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
}


def is_held_out(item: Item) -> bool:
    """True when this (shape, colour, position) is kept out of training; spread evenly over all three."""
    shape = list(OUTLINES).index(item.shape)
    colour = list(COLOURS).index(item.colour)
    row, column = POSITIONS[item.position]
    return (2 * shape + 3 * colour + 5 * (3 * row + column)) % HELD_OUT_EVERY == 0


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


def _coverage(shape: str, left: float, top: float, side: float, height_px: int, width_px: int) -> tuple:
    """Draw one shape: its antialiased coverage (h, w) in [0, 1] and the picture's slices that it fills."""
    x0, y0 = max(math.floor(left), 0), max(math.floor(top), 0)
    x1, y1 = min(math.ceil(left + side), width_px), min(math.ceil(top + side), height_px)
    k = _SUPERSAMPLING
    tile = Image.new("L", ((x1 - x0) * k, (y1 - y0) * k))
    # PIL fills the pixels that a corner falls on, hence the half pixel.
    corners = [((left + x * side - x0) * k - 0.5, (top + y * side - y0) * k - 0.5) for x, y in OUTLINES[shape]]
    ImageDraw.Draw(tile).polygon(corners, fill=255)
    return np.asarray(tile.reduce(k), np.float32) / 255, (slice(y0, y1), slice(x0, x1))


def paint_shape(picture: np.ndarray, shape: str, box: tuple[float, float, float], rgb: Sequence[float]) -> None:
    """Paint one shape over a float (h, w, 3) picture, in place. box: (left, top, side) in pixels."""
    coverage, (rows, columns) = _coverage(shape, *box, *picture.shape[:2])
    region = picture[rows, columns]
    region += coverage[..., None] * (np.asarray(rgb, np.float32) - region)


def draw_scene(scene: Scene, height_px: int = 128, width_px: int = 128) -> np.ndarray:
    """Draw the scene, antialiased. Returns (height_px, width_px, 3) uint8."""
    picture = np.empty((height_px, width_px, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for item in scene.items:
        paint_shape(picture, item.shape, item_box(item, height_px, width_px), COLOURS[item.colour])
    return (picture + 0.5).astype(np.uint8)


def _fits(box: tuple, boxes: list[tuple], mean_side: float) -> bool:
    gap = _GAP * mean_side
    left, top, side = box
    right, bottom = left + side + gap, top + side + gap
    return all(right <= x or x + s + gap <= left or bottom <= y or y + s + gap <= top for x, y, s in boxes)


def random_scene(
    rng: Random,
    count: int,
    height_px: int = 128,
    width_px: int = 128,
    *,
    held_out: bool = False,
    shapes: Sequence[str] = TRAINED_SHAPES,
) -> Scene:
    """Draw lots for a scene of `count` shapes that do not touch.

    held_out: True takes only held-out triples, False never takes one.
    shapes: names out of OUTLINES to choose from.
    """
    mean_side = math.sqrt(height_px * width_px)
    while True:
        items: list[Item] = []
        boxes: list[tuple] = []
        for _ in range(40):
            if len(items) == count:
                return Scene(rng.choice(list(BACKGROUNDS)), tuple(items))
            # Three large shapes seldom find room.
            size = rng.choice(list(SIZES)) if count < 3 else rng.choices(list(SIZES), (3, 1))[0]
            item = Item(
                rng.choice(list(shapes)),
                rng.choice(list(COLOURS)),
                rng.choice(list(POSITIONS)),
                size,
                rng.uniform(-1, 1),
                rng.uniform(-1, 1),
                rng.uniform(0.98, 1.02),
            )
            box = item_box(item, height_px, width_px)
            free = item.position not in (other.position for other in items) and _fits(box, boxes, mean_side)
            if free and is_held_out(item) == held_out:
                items.append(item)
                boxes.append(box)


_PLACES = {name: (f"in the {name}", f"at the {name}") for name in POSITIONS}
_PLACES |= {name: (f"on the {name}", f"at the {name}") for name in ("left", "right")}
_PLACES |= {name: (f"at the {name}", f"on the {name}") for name in ("top", "bottom")}
_PLACES["center"] = ("in the center", "in the middle")


def _describe_item(item: Item, rng: Random) -> str:
    size = {"small": ("small",), "large": ("large", "big")}[item.size]
    words = ["a"]
    if rng.random() < 0.75:
        words.append(rng.choice(size))
    words += [item.colour, item.shape]
    if rng.random() < 0.97:
        words.append(rng.choice(_PLACES[item.position]))
    return " ".join(words)


def describe(scene: Scene, rng: Random) -> str:
    """Put the scene into words, lower case; other words with every draw of `rng`, the size now and then unsaid."""
    items = list(scene.items)
    rng.shuffle(items)
    phrases = [_describe_item(item, rng) for item in items]
    if len(phrases) == 1:
        things = phrases[0]
    else:
        things = rng.choice((", ", " and ")).join(phrases[:-1]) + rng.choice((" and ", ", ")) + phrases[-1]
    background = scene.background
    return rng.choice(
        (
            f"{things} on a {background} background",
            f"{things}, {background} background",
            f"{things} against a {background} background",
            f"a {background} background with {things}",
        )
    )


def caption(scene: Scene) -> str:
    """The plainest caption, every attribute said: what evaluations use."""
    things = (f"a {item.size} {item.colour} {item.shape} {_PLACES[item.position][0]}" for item in scene.items)
    return f"{' and '.join(things)} on a {scene.background} background"
