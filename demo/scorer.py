"""Find background, colours, positions and shapes in a picture, and compare them with a scene.

Nothing but the picture is looked at for finding; the scene only says what should be there.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from .scenes import BACKGROUNDS, COLOURS, POSITIONS, TRAINED_SHAPES, Scene, paint_shape

ATTRIBUTES = ("background", "colour", "position", "shape")
_LEAST_AREA = 0.012  # of the picture; the smallest drawn shape covers 0.04
_TEMPLATE_PX = 32


@dataclass(frozen=True)
class Found:
    """One thing seen in a picture."""

    colour: str
    position: str
    shape: str
    area: float


def _nearest(picture: np.ndarray, palette: Iterable[tuple[int, int, int]]) -> np.ndarray:
    """Index of the nearest palette colour for every pixel: (h, w)."""
    colours = np.asarray(list(palette), np.float32)
    return ((picture[..., None, :].astype(np.float32) - colours) ** 2).sum(-1).argmin(-1)


def find_background(picture: np.ndarray) -> str:
    """The background colour that most pixels of the picture (h, w, 3) uint8 are nearest to, shapes' colours aside."""
    names = [*BACKGROUNDS, *COLOURS]
    counts = np.bincount(_nearest(picture, [*BACKGROUNDS.values(), *COLOURS.values()]).ravel(), minlength=len(names))
    return names[int(counts[: len(BACKGROUNDS)].argmax())]


@lru_cache
def _template(shape: str) -> np.ndarray:
    canvas = np.zeros((_TEMPLATE_PX, _TEMPLATE_PX, 3), np.float32)
    paint_shape(canvas, shape, (0, 0, _TEMPLATE_PX), (1, 1, 1))
    return canvas[..., 0]


def classify_shape(mask: np.ndarray, shapes: Iterable[str] = TRAINED_SHAPES) -> str:
    """The shape whose filled outline overlaps best with the mask (h, w) bool, both stretched to their boxes."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    zoom = (_TEMPLATE_PX / cut.shape[0], _TEMPLATE_PX / cut.shape[1])
    box = ndimage.zoom(cut, zoom, order=1, grid_mode=True, mode="nearest")

    def overlap(shape: str) -> float:
        template = _template(shape)
        return float(np.minimum(box, template).sum() / np.maximum(box, template).sum())

    return max(shapes, key=overlap)


def _third(start: int, stop: int, extent: int) -> int:
    """0, 1 or 2: whether a span lies nearest to the start, the middle or the end of the picture's extent."""
    offset = (start + stop - extent) / max(extent - (stop - start), 1)  # -1 at one edge, 1 at the other
    return int(np.searchsorted((-0.45, 0.45), offset))


def _position(mask: np.ndarray) -> str:
    """The name of the place where a thing of the mask's size (h, w) bool lies."""
    spans = ((np.flatnonzero(mask.any(axis)), extent) for axis, extent in zip((1, 0), mask.shape, strict=True))
    place = tuple(_third(span[0], span[-1] + 1, extent) for span, extent in spans)
    return next(name for name, value in POSITIONS.items() if value == place)


def find_masks(picture: np.ndarray, background: str) -> list[tuple[str, np.ndarray]]:
    """The coloured things on the background of a picture (h, w, 3) uint8: (colour, mask (h, w) bool) of each."""
    height, width = picture.shape[:2]
    names = list(COLOURS)
    nearest = _nearest(picture, [BACKGROUNDS[background], *COLOURS.values()])
    seeds = np.zeros((height, width), int)
    labels: list[str] = []
    for index, name in enumerate(names, 1):
        # An opening drops the thin rims where two colours blend into a third.
        parts, count = ndimage.label(ndimage.binary_opening(nearest == index, np.ones((3, 3))))
        for part in range(1, count + 1):
            if (parts == part).sum() >= _LEAST_AREA * height * width:
                labels.append(name)
                seeds[parts == part] = len(labels)
    if not labels:
        return []
    # Rims belong to the nearest thing, up to two pixels away.
    distance, (rows, columns) = ndimage.distance_transform_edt(seeds == 0, return_indices=True)
    owner = np.where((nearest > 0) & (distance <= 2), seeds[rows, columns], 0)
    return [(name, owner == label) for label, name in enumerate(labels, 1)]


def find_items(picture: np.ndarray, background: str, shapes: Iterable[str] = TRAINED_SHAPES) -> list[Found]:
    """The coloured things on the background of a picture (h, w, 3) uint8, the largest first."""
    found = [
        Found(name, _position(mask), classify_shape(mask, shapes), float(mask.mean()))
        for name, mask in find_masks(picture, background)
    ]
    return sorted(found, key=lambda thing: -thing.area)


def mean_overlap(found: list[np.ndarray], drawn: list[np.ndarray]) -> float:
    """Mean intersection over union of masks (h, w) bool, paired so that it is largest; what has no partner counts 0."""
    pairs = np.array([[(one & other).sum() / (one | other).sum() for one in found] for other in drawn])
    chosen = linear_sum_assignment(-pairs.reshape(len(drawn), len(found)))
    return float(pairs.reshape(len(drawn), len(found))[chosen].sum() / max(len(found), len(drawn)))


def pair_up(found: list[Found], scene: Scene) -> list[tuple[int, int]]:
    """(item, found) of the scene's items and the things found, so that most attributes agree; some may be left over."""
    names = ATTRIBUTES[1:]
    agree = np.array(
        [[sum(getattr(thing, n) == getattr(item, n) for n in names) for thing in found] for item in scene.items]
    )
    chosen = linear_sum_assignment(-agree.reshape(len(scene.items), len(found)))
    return [(int(item), int(thing)) for item, thing in zip(*chosen, strict=True)]


def score(picture: np.ndarray, scene: Scene, shapes: Iterable[str] = TRAINED_SHAPES) -> dict[str, tuple[int, int]]:
    """Count what a picture (h, w, 3) uint8 has right: {attribute: (right, all)}, also "count" for no more, no fewer.

    Things found are paired with the scene's items so that most attributes agree; unpaired items are all wrong.
    """
    background = find_background(picture)
    found = find_items(picture, background, shapes)
    pairs = [(scene.items[item], found[thing]) for item, thing in pair_up(found, scene)]
    total = len(scene.items)
    return {
        "background": (int(background == scene.background), 1),
        **{n: (sum(getattr(item, n) == getattr(thing, n) for item, thing in pairs), total) for n in ATTRIBUTES[1:]},
        "count": (int(len(found) == total), 1),
    }


def count_confusions(
    pictures: Iterable[np.ndarray], scenes: Iterable[Scene], shapes: Iterable[str] = TRAINED_SHAPES
) -> dict[str, Counter]:
    """What each shape of the scenes is seen as in their pictures: {shape: {seen: times}}, "nothing" where it lacks."""
    seen = {shape: Counter() for shape in shapes}
    for picture, scene in zip(pictures, scenes, strict=True):
        found = find_items(picture, find_background(picture), tuple(seen))
        partners = dict(pair_up(found, scene))
        for index, item in enumerate(scene.items):
            seen[item.shape][found[partners[index]].shape if index in partners else "nothing"] += 1
    return seen


def add_scores(scores: Iterable[dict[str, tuple[int, int]]]) -> dict[str, float]:
    """Shares of right answers over many pictures."""
    right, total = Counter(), Counter()
    for one in scores:
        for name, (good, count) in one.items():
            right[name] += good
            total[name] += count
    return {name: right[name] / total[name] for name in total}
