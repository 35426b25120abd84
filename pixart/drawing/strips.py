"""Strips: pictures joined without gaps, with a line of text."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from .lettering import load_font
from .sheets import wrap

_LABEL_PX, _FONT_PX = 16, 12
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def join_row(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side."""
    row = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)), _PAPER)
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    return row


def label_above(image: Image.Image, text: str) -> Image.Image:
    """A picture under a line of text."""
    tall = Image.new("RGB", (image.width, image.height + _LABEL_PX), _PAPER)
    ImageDraw.Draw(tall).text((3, _LABEL_PX / 2), text, _INK, load_font(_FONT_PX, [text]), "lm")
    tall.paste(image, (0, _LABEL_PX))
    return tall


def join_column(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    column = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), _PAPER)
    top = 0
    for image in images:
        column.paste(image, (0, top))
        top += image.height
    return column


def label_columns(width_px: int, texts: Sequence[str]) -> Image.Image:
    """Texts as the heading of a row of pictures, numbered from left to right, as high as they need."""
    font = load_font(_FONT_PX, texts)
    lines = [wrap(f"{number}: {text}", font, width_px - 6) for number, text in enumerate(texts, 1)]
    heading = "\n".join(lines)
    height = sum(line.count("\n") + 1 for line in lines) * _LABEL_PX
    image = Image.new("RGB", (width_px, height), _PAPER)
    for number, line in enumerate(heading.split("\n")):
        ImageDraw.Draw(image).text((3, (number + 0.5) * _LABEL_PX), line, _INK, font, "lm")
    return image
