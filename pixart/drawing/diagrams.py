"""Small pictures that nodes show of what they did: the course of the noise, and a size among the trained ones."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..resolution import ASPECT_RATIOS
from .lettering import load_font

SIZE_PX = (384, 224)
_PAPER, _GRID, _INK, _FAINT, _LINE = (24, 26, 30), (52, 56, 64), (200, 204, 210), (82, 90, 104), (88, 166, 255)
_FONT_PX, _MARGIN_PX, _DRAWN_AT = 13, 34, 2  # drawn so many times as large, for smooth lines
LEAST_SIGMA = 0.01  # below which the picture is clean to the eye; sigma 0 is drawn here


def _canvas():
    image = Image.new("RGB", tuple(side * _DRAWN_AT for side in SIZE_PX), _PAPER)
    return image, ImageDraw.Draw(image), load_font(_FONT_PX * _DRAWN_AT)


def _finish(image: Image.Image) -> Image.Image:
    return image.resize(SIZE_PX, Image.Resampling.LANCZOS)


def draw_schedule(levels: Sequence[float]) -> Image.Image:
    """The noise level (sigma, logarithmic) before each step and after the last. levels: two or more, >= 0."""
    image, draw, font = _canvas()
    logs = [math.log10(max(level, LEAST_SIGMA)) for level in levels]
    low, high = math.log10(LEAST_SIGMA), max(*logs, math.log10(LEAST_SIGMA) + 1)
    (width, height), margin = image.size, _MARGIN_PX * _DRAWN_AT

    def place(step: float, log: float) -> tuple[float, float]:
        across, down = step / (len(levels) - 1), (high - log) / (high - low)
        return margin + across * (width - 1.5 * margin), margin / 2 + down * (height - 1.5 * margin)

    for power in range(math.ceil(low), math.floor(high) + 1):
        start, end = place(0, power), place(len(levels) - 1, power)
        draw.line([start, end], _GRID, _DRAWN_AT)
        draw.text((start[0] - 4 * _DRAWN_AT, start[1]), f"{10.0**power:g}", _INK, font, "rm")
    points = [place(step, log) for step, log in enumerate(logs)]
    draw.line(points, _LINE, 2 * _DRAWN_AT, "curve")
    radius = (3.0 if len(points) <= 40 else 1.5) * _DRAWN_AT
    for x, y in points:
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], _LINE)
    text = f"sigma {levels[0]:.4g} to {levels[-1]:.2g} in {len(levels) - 1} step{'s' * (len(levels) > 2)}"
    draw.text((width / 2, height - margin / 2.5), text, _INK, font, "mm")
    return _finish(image)


def draw_bins(base_px: int, ratio: float) -> Image.Image:
    """The sizes that a model was trained at, one over the other, and the chosen one filled.

    base_px, ratio: keys of ASPECT_RATIOS and of its table.
    """
    image, draw, font = _canvas()
    table = ASPECT_RATIOS[base_px]
    (width, height), margin = image.size, _MARGIN_PX * _DRAWN_AT
    room = height - margin
    longest = max(max(size) for size in table.values())
    middle = (width / 2, room / 2)

    def box(size: tuple[int, int]) -> list[float]:
        half_height, half_width = (side / longest * (room / 2 - margin / 8) for side in size)
        half_width *= min(1.0, width / room)
        return [middle[0] - half_width, middle[1] - half_height, middle[0] + half_width, middle[1] + half_height]

    for other in table.values():
        draw.rectangle(box(other), outline=_FAINT, width=1)
    height_px, width_px = table[ratio]
    draw.rectangle(box(table[ratio]), _LINE, _INK, 2 * _DRAWN_AT)
    text = f"{width_px} x {height_px} px, {width_px * height_px / 1e6:.2f} MP, ratio {ratio:g}"
    draw.text((width / 2, height - margin / 2), text, _INK, font, "mm")
    return _finish(image)
