"""Sheets: pictures side by side in even cells, with labels."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .lettering import compose, load_font

MARGIN_PX = 16
SHEET_LIMIT_PX = 16384  # a side that every image format and viewer still takes
SIDE_WIDTH = 10  # least width of the headings beside a grid's rows, in heights of a letter
BREAKS = "_-/.,:"
BACKGROUND, INK = "white", "black"


def wrap(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    """Breaks a text into lines no wider than width_px: between words, and within a word that is wider.

    Such a word is broken behind a mark such as _ where it has one.
    """
    lines = [""]
    for word in compose(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
        while font.getlength(lines[-1]) > width_px and len(lines[-1]) > 1:
            fits = max(n for n in range(1, len(lines[-1])) if n == 1 or font.getlength(lines[-1][:n]) <= width_px)
            fits = max((n for n in range(1, fits + 1) if lines[-1][n - 1] in BREAKS), default=fits)
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return "\n".join(lines)


def cell_size(pictures: Sequence[Image.Image], limit_px: int | None = None) -> tuple[int, int]:
    """(width, height) that holds every picture, at most limit_px on the longer side."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    scale = min(1.0, (limit_px or SHEET_LIMIT_PX) / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def labelled_sheet(
    pictures: Sequence[Image.Image],
    labels: Sequence[str],
    columns: int | None = None,
    cell: tuple[int, int] | None = None,
    title: str = "",
) -> Image.Image:
    """All pictures in rows, each whole in an even cell, its label under it.

    labels: one for each picture, or none at all. columns: default as square as possible. cell: (width, height) in
    pixels; default that of the largest picture. title: a line above all.
    Raises ValueError when the numbers differ or the sheet gets too large.
    """
    _check_count(len(pictures), len(labels) or len(pictures), "labels")
    cell = cell or cell_size(pictures)
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    text_px = _text_size(cell[0])
    font = load_font(text_px, [*labels, title])
    texts = [wrap(label, font, cell[0]) for label in labels]
    label_px = max((_height(text, text_px) for text in texts), default=0)
    step = (cell[0] + MARGIN_PX, cell[1] + MARGIN_PX + label_px)
    rows = -(-len(pictures) // columns)
    width = columns * step[0] + MARGIN_PX
    title = wrap(title, font, width - 2 * MARGIN_PX)
    title_px = _height(title, text_px) if title else 0
    sheet = _blank(width, rows * step[1] + MARGIN_PX + title_px)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN_PX, MARGIN_PX // 2), title, INK, font, spacing=text_px // 4)
    for index, picture in enumerate(pictures):
        left, top = MARGIN_PX + index % columns * step[0], MARGIN_PX + title_px + index // columns * step[1]
        _paste(sheet, picture, left, top, cell)
        if texts:
            draw.text((left, top + cell[1] + text_px // 4), texts[index], INK, font, spacing=text_px // 4)
    return sheet


def comparison_grid(
    pictures: Sequence[Image.Image], rows: Sequence[str], columns: Sequence[str], title: str = ""
) -> Image.Image:
    """A table of pictures, row after row, with a heading for every row and column.

    rows, columns: the headings; their product is the number of pictures. A single empty heading takes no space.
    Raises ValueError when the numbers differ or the sheet gets too large.
    """
    _check_count(len(pictures), len(rows) * len(columns), "cells of the grid")
    cell = cell_size(pictures)
    text_px = _text_size(cell[0])
    font = load_font(text_px, [*rows, *columns, title])
    side_px = max(cell[0] // 2, SIDE_WIDTH * text_px)
    heads, sides = [wrap(text, font, cell[0]) for text in columns], [wrap(text, font, side_px) for text in rows]
    left_px = max((font.getlength(line) for side in sides for line in side.split("\n")), default=0)
    left_px = int(left_px) + MARGIN_PX if left_px else 0
    width = MARGIN_PX + left_px + len(columns) * (cell[0] + MARGIN_PX)
    title = wrap(title, font, width - 2 * MARGIN_PX)
    title_px = _height(title, text_px) if title else 0
    head_px = max(_height(head, text_px) if head else 0 for head in heads)
    top_px = MARGIN_PX + title_px + head_px
    row_px = max(cell[1], *(_height(side, text_px) if side else 0 for side in sides))
    sheet = _blank(width, top_px + len(rows) * (row_px + MARGIN_PX))
    draw = ImageDraw.Draw(sheet)
    spacing = text_px // 4
    draw.text((MARGIN_PX, MARGIN_PX // 2), title, INK, font, spacing=spacing)
    for column, head in enumerate(heads):
        left = MARGIN_PX + left_px + column * (cell[0] + MARGIN_PX)
        draw.text((left + cell[0] / 2, top_px - spacing), head, INK, font, "md", spacing, "center")
    for row, side in enumerate(sides):
        top = top_px + row * (row_px + MARGIN_PX)
        draw.text((MARGIN_PX, top + row_px / 2), side, INK, font, "lm", spacing)
        for column in range(len(columns)):
            left = MARGIN_PX + left_px + column * (cell[0] + MARGIN_PX)
            _paste(sheet, pictures[row * len(columns) + column], left, top + (row_px - cell[1]) // 2, cell)
    return sheet


def _text_size(cell_width_px: int) -> int:
    return min(max(cell_width_px // 16, 12), 40)


def _height(text: str, text_px: int) -> int:
    return (text.count("\n") + 1) * (text_px + text_px // 4) + text_px // 4


def _paste(sheet: Image.Image, picture: Image.Image, left: int, top: int, cell: tuple[int, int]) -> None:
    """Puts a picture whole into the middle of a cell."""
    scale = min(cell[0] / picture.width, cell[1] / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    fitted = picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(fitted.convert("RGB"), (left + (cell[0] - size[0]) // 2, top + (cell[1] - size[1]) // 2))


def _blank(width_px: int, height_px: int) -> Image.Image:
    if max(width_px, height_px) > SHEET_LIMIT_PX:
        raise ValueError(
            f"Sheet too large: got {width_px}x{height_px}, expected at most {SHEET_LIMIT_PX} px a side. "
            f"Use fewer or smaller pictures, or another number of columns."
        )
    return Image.new("RGB", (width_px, height_px), BACKGROUND)


def _check_count(got: int, expected: int, what: str) -> None:
    if got != expected or not got:
        raise ValueError(
            f"Number of pictures does not fit: got {got} pictures for {expected} {what}, expected one for each. "
            f"Connect the pictures and texts of the same run."
        )
