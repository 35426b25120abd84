"""Find background and icons in a picture, and compare them with a scene: names, outlines, and every pixel.

Nothing but the picture is looked at for finding; the scene only says what should be there.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import permutations, product

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from .outlines import FILLINGS, NAMES, coverage
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SIZES,
    Background,
    Scene,
    paint_background,
    paint_icon,
    tones,
)

ATTRIBUTES = ("background", "colour", "position", "shape", "filling", "size", "count")
_LEAST_AREA = 0.006  # of the picture; the smallest drawn icon covers 0.02
_TEMPLATE_PX = 32
_FAR = 48  # of 255: a pixel this far from a background's colour is none of it
_CANDIDATES = (
    *(Background("plain", name, name) for name in BACKGROUNDS),
    *(Background(kind, *pair) for kind in ("gradient", "horizon") for pair in permutations(BACKGROUNDS, 2)),
)


@dataclass(frozen=True)
class Found:
    """One icon seen in a picture; box: (left, top, side) in pixels."""

    shape: str
    colour: str
    position: str
    size: str
    filling: str
    box: tuple[float, float, float]


@dataclass
class Reading:
    """What is seen in a picture, and how far the picture is from those things drawn well.

    error: mean absolute difference, 0 to 1. outline_px: mean distance of the outlines, None where there are none.
    """

    background: Background
    found: list[Found] = field(default_factory=list)
    error: float = 0.0
    outline_px: float | None = None


@lru_cache
def _columns(height: int) -> np.ndarray:
    """The candidates' colours from top to bottom: (candidates, height, 3)."""
    return np.stack([paint_background(each, height, 1)[:, 0] for each in _CANDIDATES])


def find_background(picture: np.ndarray) -> Background:
    """The background that most pixels of the picture (h, w, 3) uint8 are near."""
    pixels = picture[:, ::2].astype(np.float32)
    columns = _columns(len(picture))
    near = [np.maximum(0, 1 - np.abs(pixels - column[:, None]).max(-1) / _FAR).sum() for column in columns]
    return _CANDIDATES[int(np.argmax(near))]


@lru_cache
def _palette() -> np.ndarray:
    return np.concatenate([tones(name) for name in COLOURS])


def _nearest(picture: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Index of the nearest tone for every pixel (h, w), the colours' in turn; -1 where the background is nearer."""
    pixels = picture.astype(np.float32)
    distances = ((pixels[..., None, :] - _palette()) ** 2).sum(-1)
    index = distances.argmin(-1)
    own = np.take_along_axis(distances, index[..., None], -1)[..., 0]
    return np.where(((pixels - ground) ** 2).sum(-1) <= own, -1, index)


@lru_cache
def _template(shape: str) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """An icon's mask stretched to its bounds, and the bounds in the unit square: left, top, right, bottom."""
    side = 96
    mask = coverage(shape, 0, 0, side, side, side)[0][..., 0] >= 0.5
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    bounds = columns[0] / side, rows[0] / side, (columns[-1] + 1) / side, (rows[-1] + 1) / side
    return _stretch(mask), bounds


def _stretch(mask: np.ndarray) -> np.ndarray:
    """What is inside the mask's bounds, as a square of _TEMPLATE_PX: float in [0, 1]."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    zoom = (_TEMPLATE_PX / cut.shape[0], _TEMPLATE_PX / cut.shape[1])
    return ndimage.zoom(cut, zoom, order=1, grid_mode=True, mode="nearest")


def classify(mask: np.ndarray) -> str:
    """The icon whose filled outline overlaps best with the mask (h, w) bool, both stretched to their bounds.

    A mask of other proportions than the icon's counts less.
    """
    box = _stretch(mask)
    height, width = (np.ptp(np.flatnonzero(mask.any(axis))) + 1 for axis in (1, 0))

    def likeness(shape: str) -> float:
        template, (left, top, right, bottom) = _template(shape)
        overlap = np.minimum(box, template).sum() / np.maximum(box, template).sum()
        return float(overlap) - 0.5 * abs(np.log((width / height) / ((right - left) / (bottom - top))))

    return max(NAMES, key=likeness)


def _box_of(mask: np.ndarray, shape: str) -> tuple[float, float, float]:
    """The box (left, top, side) in which the icon would have the mask's bounds."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    left, top, right, bottom = _template(shape)[1]
    side = (np.ptp(columns) + 1 + np.ptp(rows) + 1) / (right - left + bottom - top)
    middle_x, middle_y = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    return middle_x - side * (left + right) / 2, middle_y - side * (top + bottom) / 2, side


def _misfit(picture: np.ndarray, ground: np.ndarray, found: Found) -> float:
    """Sum of the absolute differences between the picture and the icon drawn, about the icon's box."""
    left, top, side = found.box
    rows = slice(max(int(top) - 3, 0), int(top + side) + 4)
    columns = slice(max(int(left) - 3, 0), int(left + side) + 4)
    drawn = ground[rows, columns].copy()
    paint_icon(drawn, found.shape, (left - columns.start, top - rows.start, side), tones(found.colour), found.filling)
    return float(np.abs(drawn - picture[rows, columns]).sum())


def _refine(picture: np.ndarray, ground: np.ndarray, found: Found) -> Found:
    """The filling and the box, moved by parts of a pixel, with which the drawn icon comes nearest to the picture."""

    def changed(filling: str, box: tuple) -> Found:
        return Found(found.shape, found.colour, found.position, found.size, filling, box)

    best = min((changed(name, found.box) for name in FILLINGS), key=lambda each: _misfit(picture, ground, each))
    least = _misfit(picture, ground, best)
    for step in (0.8, 0.4, 0.2):
        for _, (axis, sign) in product(range(2), product(range(3), (-1, 1))):
            left, top, side = best.box
            move = sign * step
            box = ((left + move, top, side), (left, top + move, side), (left - move / 2, top - move / 2, side + move))
            trial = changed(best.filling, box[axis])
            if (misfit := _misfit(picture, ground, trial)) < least:
                best, least = trial, misfit
    return best


def _name_place(box: tuple[float, float, float], height: int, width: int) -> str:
    """The name of the place where an icon's box lies."""
    left, top, side = box
    # -1 at one edge, 1 at the other.
    offsets = ((2 * start + side - extent) / max(extent - side, 1) for start, extent in ((top, height), (left, width)))
    place = tuple(int(np.searchsorted((-0.45, 0.45), offset)) for offset in offsets)
    return next(name for name, value in POSITIONS.items() if value == place)


def _name_size(side: float, height: int, width: int) -> str:
    share = side / (height * width) ** 0.5
    return min(SIZES, key=lambda name: abs(SIZES[name] - share))


def _outline_distance(one: np.ndarray, other: np.ndarray) -> float | None:
    """Mean distance in pixels between the rims of two masks (h, w) bool, both ways; None when either is empty."""
    rims = [mask ^ ndimage.binary_erosion(mask, border_value=1) for mask in (one, other)]
    if not (rims[0].any() and rims[1].any()):
        return None
    away = [ndimage.distance_transform_edt(~rim) for rim in rims]
    return float((away[1][rims[0]].mean() + away[0][rims[1]].mean()) / 2)


def read(picture: np.ndarray) -> Reading:
    """Find what a picture (h, w, 3) uint8 shows, and how well."""
    height, width = picture.shape[:2]
    background = find_background(picture)
    ground = paint_background(background, height, width)
    nearest = _nearest(picture, ground)
    parts, count = ndimage.label(nearest >= 0, np.ones((3, 3)))
    reading = Reading(background)
    for part in range(1, count + 1):
        mask = parts == part
        if mask.sum() < _LEAST_AREA * height * width:
            continue
        colour = list(COLOURS)[int(np.bincount(nearest[mask] // 3, minlength=len(COLOURS)).argmax())]
        shape = classify(mask)
        box = _box_of(mask, shape)
        place, size = _name_place(box, height, width), _name_size(box[2], height, width)
        first = Found(shape, colour, place, size, "plain", box)
        reading.found.append(_refine(picture.astype(np.float32), ground, first))
    ideal = ground.copy()
    for thing in reading.found:
        paint_icon(ideal, thing.shape, thing.box, tones(thing.colour), thing.filling)
    reading.error = float(np.abs(ideal - picture).mean() / 255)
    reading.outline_px = _outline_distance(nearest >= 0, _nearest(ideal.round(), ground) >= 0)
    return reading


def pair(reading: Reading, scene: Scene) -> list[tuple[int, int]]:
    """(item, found) of the scene's items and the things found, so that most attributes agree."""
    names = ("colour", "position", "shape", "filling", "size")
    agree = np.array(
        [[sum(getattr(thing, n) == getattr(item, n) for n in names) for thing in reading.found] for item in scene.items]
    ).reshape(len(scene.items), len(reading.found))
    return [(int(a), int(b)) for a, b in zip(*linear_sum_assignment(-agree), strict=True)]


def score(reading: Reading, scene: Scene) -> dict[str, tuple[int, int]]:
    """Count what a picture has right: {attribute: (right, all)}; "count" is for no icon more, no fewer.

    Items without a partner among the things found are all wrong.
    """
    pairs = [(scene.items[item], reading.found[thing]) for item, thing in pair(reading, scene)]
    total = len(scene.items)
    counts = {
        name: (sum(getattr(item, name) == getattr(thing, name) for item, thing in pairs), total)
        for name in ATTRIBUTES[1:-1]
    }
    alike = int(reading.background == scene.background)
    return {"background": (alike, 1), **counts, "count": (int(len(reading.found) == total), 1)}


def add_scores(scores: Iterable[dict[str, tuple[int, int]]]) -> dict[str, float]:
    """Shares of right answers over many pictures."""
    right, total = Counter(), Counter()
    for one in scores:
        for name, (good, count) in one.items():
            right[name] += good
            total[name] += count
    return {name: right[name] / total[name] for name in total}


def confusion(readings: Iterable[Reading], scenes: Iterable[Scene]) -> dict[str, Counter]:
    """What each shape was seen as, over many pictures: {shape: {seen: times}}; "nothing" where it was missing."""
    seen = {name: Counter() for name in NAMES}
    for reading, scene in zip(readings, scenes, strict=True):
        pairs = dict(pair(reading, scene))
        for index, item in enumerate(scene.items):
            seen[item.shape][reading.found[pairs[index]].shape if index in pairs else "nothing"] += 1
    return seen
