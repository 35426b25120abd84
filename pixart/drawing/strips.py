"""Strips: pictures joined without gaps, with a line of text."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from .lettering import load_font

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
