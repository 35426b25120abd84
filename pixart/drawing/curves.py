"""The course of a number as a picture."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from .lettering import load_font

_FONT_PX = 12
_PAPER, _GRID, _INK, _FAINT, _LINE = (255, 255, 255), (225, 225, 225), (60, 60, 60), (176, 205, 235), (31, 97, 172)
_OTHER = (214, 96, 20)


def draw_curve(
    losses: Sequence[tuple[int, float]],
    size: tuple[int, int] = (768, 384),
    font_px: int = _FONT_PX,
    validations: Sequence[tuple[int, float]] = (),
) -> Image.Image:
    """Losses by step as a picture: each one faint, and smoothed over 2 % of them; those of validations as they are."""
    image = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(image), load_font(font_px)
    points = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    if not points:
        draw.text((size[0] // 2, size[1] // 2), "no loss yet", _INK, font, "mm")
        return image
    box = (round(5.4 * font_px), 16, size[0] - 24, size[1] - 3 * font_px)  # left, top, right, bottom
    smooth = _smooth(points, max(1, len(points) // 50))
    # Single losses reach far beyond their course: the axis ends above nine in ten of them.
    ordered = sorted(loss for _, loss in points)
    validated = [(step, loss) for step, loss in validations if math.isfinite(loss)]
    tops = [ordered[int(0.9 * (len(ordered) - 1))], *(loss for _, loss in (*smooth, *validated))]
    high = max(tops) * 1.1 or 1.0
    first = min(step for step, _ in (points[0], *validated[:1]))
    steps = (first, max(points[-1][0], first + 1))

    def place(point):
        x = box[0] + (point[0] - steps[0]) / (steps[1] - steps[0]) * (box[2] - box[0])
        return x, box[3] - min(max(point[1], 0) / high, 1) * (box[3] - box[1])

    shown = set()
    for share in range(5):
        y = box[3] - share / 4 * (box[3] - box[1])
        draw.line((box[0], y, box[2], y), fill=_GRID)
        draw.text((box[0] - 6, y), f"{high * share / 4:.3g}", _INK, font, "rm")
        step = steps[0] + share / 4 * (steps[1] - steps[0])
        x = box[0] + share / 4 * (box[2] - box[0])
        if f"{step:.0f}" not in shown:  # of few steps, several places round to one
            draw.text((x, box[3] + 4), f"{step:.0f}", _INK, font, "mt")
        shown.add(f"{step:.0f}")
    text = f"step; loss {points[-1][1]:.4g}, smoothed {smooth[-1][1]:.4g}"
    draw.text((box[0], size[1] - 4), text, _INK, font, "ls")
    if validated:
        start = box[0] + font.getlength(f"{text}, ")
        draw.text((start, size[1] - 4), f"validation {validated[-1][1]:.4g}", _OTHER, font, "ls")
    thin = points[:: max(1, len(points) // (4 * size[0]))]
    for course, colour, width in ((thin, _FAINT, 1), (smooth, _LINE, 3), *([(validated, _OTHER, 3)] * bool(validated))):
        places = [place(point) for point in course]
        draw.line(places if len(places) > 1 else places * 2, fill=colour, width=width, joint="curve")
    return image


def _smooth(points, width):
    """Means over windows of 2 * width + 1 points, at about 500 of them."""
    totals = [0.0]
    for _, loss in points:
        totals.append(totals[-1] + loss)
    found = []
    for index in range(0, len(points), max(1, len(points) // 500)):
        low, high = max(0, index - width), min(len(points), index + width + 1)
        found.append((points[index][0], (totals[high] - totals[low]) / (high - low)))
    return found
