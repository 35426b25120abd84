"""How near a picture is to the scene that is seen in it, drawn well: its outlines, and every pixel."""

from itertools import product

import numpy as np
from scipy import ndimage

from .scenes import BACKGROUNDS, COLOURS, paint_shape
from .scorer import classify_shape, find_background, find_masks

_STEPS_PX = (0.8, 0.4, 0.2)  # by which a shape's box is moved until the drawn shape comes nearest to the picture


def _paint(picture: np.ndarray, shape: str, colour: str, box: tuple[float, float, float]) -> None:
    """Paint a shape over a float (h, w, 3) picture, in place; what of its box lies outside is cut off."""
    margin = 8
    canvas = np.pad(picture, ((margin, margin), (margin, margin), (0, 0)))
    paint_shape(canvas, shape, (box[0] + margin, box[1] + margin, box[2]), COLOURS[colour])
    picture[:] = canvas[margin:-margin, margin:-margin]


def _fit(picture: np.ndarray, ground: np.ndarray, shape: str, colour: str, mask: np.ndarray) -> tuple:
    """The box (left, top, side) in which the drawn shape comes nearest to the picture, from the mask's bounds on."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    near = tuple(slice(max(spans[0] - 4, 0), spans[-1] + 5) for spans in (rows, columns))
    target = picture[near]

    def misfit(box: tuple[float, float, float]) -> float:
        drawn = ground[near].copy()
        _paint(drawn, shape, colour, (box[0] - near[1].start, box[1] - near[0].start, box[2]))
        return float(np.abs(drawn - target).sum())

    side = (np.ptp(rows) + np.ptp(columns)) / 2 + 1
    best = ((columns[0] + columns[-1] + 1 - side) / 2, (rows[0] + rows[-1] + 1 - side) / 2, side)
    least = misfit(best)
    for step, _, axis, sign in product(_STEPS_PX, range(2), range(3), (-1, 1)):
        left, top, side = best
        move = sign * step
        box = ((left + move, top, side), (left, top + move, side), (left - move / 2, top - move / 2, side + move))[axis]
        if (trial := misfit(box)) < least:
            best, least = box, trial
    return best


def draw_what_is_seen(picture: np.ndarray, background: str) -> np.ndarray:
    """The shapes that are found in a picture (h, w, 3) uint8, drawn well in their places: float32 of its size."""
    ground = np.empty(picture.shape, np.float32)
    ground[:] = BACKGROUNDS[background]
    ideal = ground.copy()
    for colour, mask in find_masks(picture, background):
        shape = classify_shape(mask)
        _paint(ideal, shape, colour, _fit(picture.astype(np.float32), ground, shape, colour, mask))
    return ideal


def _rim(picture: np.ndarray, background: str) -> np.ndarray:
    """The pixels (h, w) bool along the insides of the outlines of all shapes that are found."""
    masks = [mask for _, mask in find_masks(picture, background)]
    whole = np.any(masks, axis=0) if masks else np.zeros(picture.shape[:2], bool)
    return whole ^ ndimage.binary_erosion(whole, border_value=1)


def measure_sharpness(picture: np.ndarray) -> tuple[float, float | None]:
    """Compare a picture (h, w, 3) uint8 with what is seen in it, drawn well.

    Returns the mean absolute difference, 0 to 1, and the mean distance of the outlines in pixels, both ways; None for
    the distance in a picture without shapes.
    """
    background = find_background(picture)
    ideal = draw_what_is_seen(picture, background)
    error = float(np.abs(ideal - picture).mean() / 255)
    rims = _rim(picture, background), _rim(ideal.round().astype(np.uint8), background)
    if not all(rim.any() for rim in rims):
        return error, None
    away = [ndimage.distance_transform_edt(~rim) for rim in rims]
    return error, float((away[1][rims[0]].mean() + away[0][rims[1]].mean()) / 2)
