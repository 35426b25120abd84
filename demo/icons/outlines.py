"""The icons that the demo model learns: flat shapes as layers of polygons in the unit square, and their fillings."""

import math

import numpy as np
from PIL import Image, ImageDraw

Points = list[tuple[float, float]]
BASE, DARK, HOLE = "base", "dark", "hole"  # tones of a layer
FILLINGS = ("plain", "striped", "dotted")
BANDS = 5  # of a striped icon, the first and the last in its own colour

_SUPERSAMPLING = 4
_CORNERS = 64  # of a round outline
_TIP = 55  # degrees of the crescent's tips from the right
_DOT_RADIUS, _DOT_SPACING = 0.1, 1 / 3  # over the icon's side


def _ellipse(x: float, y: float, rx: float, ry: float | None = None, start: float = 0, stop: float = 360) -> Points:
    """An arc about (x, y) in degrees, clockwise from the right; a whole ellipse by default."""
    angles = np.radians(np.linspace(start, stop, _CORNERS, endpoint=stop - start < 360))
    return [(x + rx * math.cos(a), y + (ry or rx) * math.sin(a)) for a in angles]


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _cross() -> Points:
    a, b = 0.32, 0.68
    return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]


def _star() -> Points:
    corners = []
    for k in range(10):
        radius = 0.52 if k % 2 == 0 else 0.23
        angle = math.pi * k / 5 - math.pi / 2
        corners.append((0.5 + radius * math.cos(angle), 0.53 + radius * math.sin(angle)))
    return corners


def _heart() -> Points:
    corners = []
    for a in np.linspace(0, 2 * math.pi, _CORNERS, endpoint=False):
        x = 16 * math.sin(a) ** 3
        y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        corners.append((0.5 + x / 32, 0.5 - (y + 2.5) / 30))
    return corners


def _moon() -> Points:
    """A crescent, open to the right: the outer arc clockwise, then the inner one back."""
    outer = _ellipse(0.54, 0.5, 0.5, start=_TIP, stop=360 - _TIP)
    tip_x, tip_y = 0.5 * math.cos(math.radians(_TIP)), 0.5 * math.sin(math.radians(_TIP))
    shift = 0.2
    radius, angle = math.hypot(tip_x - shift, tip_y), math.degrees(math.atan2(tip_y, tip_x - shift))
    return outer + _ellipse(0.54 + shift, 0.5, radius, start=360 - angle, stop=angle)


def _petals(count: int) -> list[tuple[Points, str]]:
    turns = [2 * math.pi * k / count - math.pi / 2 for k in range(count)]
    return [(_ellipse(0.5 + 0.29 * math.cos(a), 0.52 + 0.29 * math.sin(a), 0.205), BASE) for a in turns]


# name: layers from below to above, each a polygon (x to the right, y down) and its tone.
ICONS: dict[str, list[tuple[Points, str]]] = {
    "circle": [(_ellipse(0.5, 0.5, 0.5), BASE)],
    "square": [(_box(0, 0, 1, 1), BASE)],
    "triangle": [([(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)], BASE)],
    "cross": [(_cross(), BASE)],
    "star": [(_star(), BASE)],
    "heart": [(_heart(), BASE)],
    "ring": [(_ellipse(0.5, 0.5, 0.5), BASE), (_ellipse(0.5, 0.5, 0.27), HOLE)],
    "moon": [(_moon(), BASE)],
    "arrow": [([(0, 0.33), (0.5, 0.33), (0.5, 0.04), (1, 0.5), (0.5, 0.96), (0.5, 0.67), (0, 0.67)], BASE)],
    "flower": [*_petals(6), (_ellipse(0.5, 0.52, 0.15), DARK)],
    "house": [
        (_box(0.12, 0.42, 0.88, 1), BASE),
        ([(0, 0.5), (0.5, 0.0), (1, 0.5)], DARK),
        (_box(0.4, 0.66, 0.62, 1), DARK),
    ],
    "tree": [
        (_box(0.42, 0.55, 0.58, 1), DARK),
        (_ellipse(0.5, 0.25, 0.25), BASE),
        (_ellipse(0.28, 0.47, 0.24), BASE),
        (_ellipse(0.72, 0.47, 0.24), BASE),
        (_box(0.3, 0.3, 0.7, 0.71), BASE),
    ],
    "fish": [
        ([(0.5, 0.5), (1, 0.18), (0.9, 0.5), (1, 0.82)], BASE),
        (_ellipse(0.4, 0.5, 0.4, 0.3), BASE),
        (_ellipse(0.19, 0.43, 0.075), DARK),
    ],
    "cat": [
        ([(0.06, 0.0), (0.52, 0.3), (0.1, 0.6)], BASE),
        ([(0.94, 0.0), (0.48, 0.3), (0.9, 0.6)], BASE),
        (_ellipse(0.5, 0.58, 0.5, 0.42), BASE),
        (_ellipse(0.29, 0.53, 0.085, 0.115), DARK),
        (_ellipse(0.71, 0.53, 0.085, 0.115), DARK),
        ([(0.4, 0.7), (0.6, 0.7), (0.5, 0.83)], DARK),
    ],
}
NAMES = tuple(ICONS)


def coverage(name: str, left: float, top: float, side: float, height_px: int, width_px: int) -> tuple:
    """Draw an icon's tones: (h, w, 2) float32 in [0, 1], how much of a pixel is the icon, and how much of it dark;
    and the picture's slices that they fill. left, top, side: the icon's box in pixels.
    """
    x0, y0 = max(math.floor(left), 0), max(math.floor(top), 0)
    x1, y1 = min(math.ceil(left + side), width_px), min(math.ceil(top + side), height_px)
    k = _SUPERSAMPLING
    size = ((x1 - x0) * k, (y1 - y0) * k)
    whole, dark = Image.new("L", size), Image.new("L", size)
    pens = ImageDraw.Draw(whole), ImageDraw.Draw(dark)
    for points, tone in ICONS[name]:
        # PIL fills the pixels that a corner falls on, hence the half pixel.
        corners = [((left + x * side - x0) * k - 0.5, (top + y * side - y0) * k - 0.5) for x, y in points]
        pens[0].polygon(corners, fill=0 if tone == HOLE else 255)
        pens[1].polygon(corners, fill=255 if tone == DARK else 0)
    tones = np.stack([np.asarray(image.reduce(k), np.float32) for image in (whole, dark)], -1) / 255
    return tones, (slice(y0, y1), slice(x0, x1))


def lightness(filling: str, left: float, top: float, side: float, rows: slice, columns: slice) -> np.ndarray | float:
    """How much of each pixel the filling paints light: (h, w) in [0, 1]; 0 for a plain one."""
    if filling == "plain":
        return 0.0
    y = (np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5 - top) / side
    x = (np.arange(columns.start, columns.stop, dtype=np.float32)[None] + 0.5 - left) / side
    if filling == "striped":
        distance = np.abs((y * BANDS - 0.5) % 2 - 1) / BANDS  # to the middle of a light band
        return np.clip((0.5 / BANDS - distance) * side + 0.5, 0, 1) + 0 * x
    row = np.floor(y / _DOT_SPACING)
    shift = (row % 2 - 0.5) * 0.5
    across = (x / _DOT_SPACING + shift) % 1 - 0.5
    down = y / _DOT_SPACING - row - 0.5
    distance = np.hypot(across, down) * _DOT_SPACING
    return np.clip((_DOT_RADIUS - distance) * side + 0.5, 0, 1)
