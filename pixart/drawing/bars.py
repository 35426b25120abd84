"""Numbers of a few groups side by side as bars."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from .lettering import load_font

_FONT_PX = 12
_PAPER, _GRID, _INK = (255, 255, 255), (225, 225, 225), (60, 60, 60)
_COLOURS = ((176, 205, 235), (31, 97, 172), (214, 96, 20))


def draw_bars(
    labels: Sequence[str], series: Mapping[str, Sequence[float | None]], size: tuple[int, int] = (768, 320)
) -> Image.Image:
    """A group of bars for each label, one of each series, at most three; None leaves a gap."""
    image = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(image), load_font(_FONT_PX)
    box = (round(5.4 * _FONT_PX), 16 + 2 * _FONT_PX, size[0] - 24, size[1] - 2 * _FONT_PX)
    high = max((value for values in series.values() for value in values if value is not None), default=0) * 1.1 or 1.0
    for share in range(5):
        y = box[3] - share / 4 * (box[3] - box[1])
        draw.line((box[0], y, box[2], y), fill=_GRID)
        draw.text((box[0] - 6, y), f"{high * share / 4:.3g}", _INK, font, "rm")
    width = (box[2] - box[0]) / len(labels)
    left = float(box[0])
    for (name, values), colour in zip(series.items(), _COLOURS, strict=False):
        draw.rectangle((left, 8, left + _FONT_PX, 8 + _FONT_PX), fill=colour)
        draw.text((left + 1.5 * _FONT_PX, 8), name, _INK, font, "lt")
        left += 3 * _FONT_PX + font.getlength(name)
        number = list(series).index(name)
        for place, value in enumerate(values):
            if value is not None:
                x = box[0] + width * (place + 0.1 + 0.8 * number / len(series))
                top = box[3] - value / high * (box[3] - box[1])
                draw.rectangle((x, top, x + 0.8 * width / len(series) - 1, box[3]), fill=colour)
    for place, label in enumerate(labels):
        draw.text((box[0] + width * (place + 0.5), box[3] + 4), label, _INK, font, "mt")
    return image
