"""Losses by learning rate as a picture."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from .lettering import load_font

_FONT_PX = 12
_PAPER, _GRID, _INK, _LINE, _MARK = (255, 255, 255), (225, 225, 225), (60, 60, 60), (31, 97, 172), (214, 96, 20)


def draw_rates(
    points: Sequence[tuple[float, float]], marked: float | None = None, size: tuple[int, int] = (768, 384)
) -> Image.Image:
    """Losses over the logarithm of their rates, rising; a line where one is marked. points: at least one."""
    image = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(image), load_font(_FONT_PX)
    box = (round(5.4 * _FONT_PX), 16, size[0] - 24, size[1] - 3 * _FONT_PX)
    losses, powers = [loss for _, loss in points], [math.log10(rate) for rate, _ in points]
    low, span = min(losses), max(losses) - min(losses) or 1.0
    first, width = math.floor(powers[0]), max(math.ceil(powers[-1]) - math.floor(powers[0]), 1)

    def place(power: float, loss: float) -> tuple[float, float]:
        return box[0] + (power - first) / width * (box[2] - box[0]), box[3] - (loss - low) / span * (box[3] - box[1])

    for share in range(5):
        _, y = place(first, low + span * share / 4)
        draw.line((box[0], y, box[2], y), fill=_GRID)
        draw.text((box[0] - 6, y), f"{low + span * share / 4:.4g}", _INK, font, "rm")
    for power in range(first, first + width + 1):
        x, _ = place(power, low)
        draw.line((x, box[1], x, box[3]), fill=_GRID)
        draw.text((x, box[3] + 4), f"1e{power}", _INK, font, "mt")
    if marked is not None:
        x, _ = place(math.log10(marked), low)
        draw.line((x, box[1], x, box[3]), fill=_MARK, width=2)
    course = [place(power, loss) for power, loss in zip(powers, losses, strict=True)]
    draw.line(course if len(course) > 1 else course * 2, fill=_LINE, width=3, joint="curve")
    text = "learning rate; loss at fixed noise" + (f"; suggested {marked:.2g}" if marked is not None else "")
    draw.text((box[0], size[1] - 4), text, _INK, font, "ls")
    return image
