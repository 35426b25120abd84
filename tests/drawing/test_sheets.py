"""Sheets and grids: every picture whole, in even cells, under its label."""

import pytest
from PIL import Image, ImageFont

from pixart_pack.pixart.drawing.sheets import MARGIN_PX, SHEET_LIMIT_PX, comparison_grid, labelled_sheet, wrap

RED = (255, 0, 0)


def count(sheet, colour):
    return sum(number for number, found in sheet.getcolors(1 << 24) if found == colour)


def red(width, height):
    return Image.new("RGB", (width, height), "red")


@pytest.mark.parametrize("word", ["x" * 60, "short"])
def test_no_line_is_wider_than_the_cell(word):
    font = ImageFont.load_default(16)
    text = "a large purple triangle in the bottom right and " + word
    lines = wrap(text, font, 200).split("\n")
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= 200 for line in lines)
    assert len(lines) > 1


@pytest.mark.parametrize(("number", "columns"), [(1, 1), (4, 4), (5, 4)])
def test_a_sheet_holds_every_picture_whole(number, columns):
    sheet = labelled_sheet([red(64, 128)] * number, ["a red picture"] * number, 4, (256, 256))
    assert sheet.width == columns * (256 + MARGIN_PX) + MARGIN_PX
    assert count(sheet, RED) == number * 128 * 256
    assert any(max(colour) < 100 for _, colour in sheet.getcolors(1 << 24)), "no label is to be seen"


def test_a_sheet_takes_a_title_above_its_pictures():
    plain, titled = (labelled_sheet([red(256, 64)] * 2, [], title=title) for title in ("", "model, 20 steps"))
    more_px = titled.height - plain.height
    assert more_px > 0 and titled.width == plain.width and count(titled, RED) == count(plain, RED)
    assert any(max(colour) < 100 for _, colour in titled.crop((0, 0, 300, more_px)).getcolors(1 << 24))


def test_a_sheet_without_labels_is_as_square_as_it_can_be():
    sheet = labelled_sheet([red(32, 32)] * 5, [])
    assert sheet.size == (3 * 48 + MARGIN_PX, 2 * 48 + MARGIN_PX)


def test_a_grid_puts_pictures_of_any_size_into_even_cells_row_by_row():
    colours = ["red", "lime", "blue", "yellow", "cyan", "magenta"]
    pictures = [Image.new("RGB", (96, 64) if i % 2 else (64, 96), colour) for i, colour in enumerate(colours)]
    sheet = comparison_grid(pictures, ["3", "4.5"], ["8 steps", "14 steps", "20 steps"], "guidance against steps")
    centres = [
        (sheet.width - 3 * 112 + 112 * c + 48, sheet.height - 2 * 112 + 112 * r + 48) for r in (0, 1) for c in range(3)
    ]
    assert [sheet.getpixel(centre) for centre in centres] == [picture.getpixel((5, 5)) for picture in pictures]


def test_a_grid_of_one_row_has_no_space_for_its_empty_heading():
    assert comparison_grid([red(64, 64)] * 2, [""], ["a", "b"]).width == 2 * (64 + MARGIN_PX) + MARGIN_PX


def test_rows_have_space_for_their_headings():
    long = "a large purple triangle in the bottom right corner of a room with many things in it"
    one, many = (comparison_grid([red(64, 40)] * 4, [text, long], ["1", "2"]) for text in ("short", long))
    assert one.size == many.size and many.height > 2 * (40 + MARGIN_PX) + 40
    assert count(many, RED) == 4 * 64 * 40
    clear = many.crop((0, many.height - 8, many.width, many.height))  # nothing reaches the edge
    assert clear.getcolors() == [(many.width * 8, (255, 255, 255))]
    lines = ["sampler_", "name", "pixart_dpm_", "solver"]
    assert wrap("sampler_name pixart_dpm_solver", ImageFont.load_default(12), 70).split("\n") == lines


def test_letters_beyond_latin_are_drawn():
    pictures = [red(64, 64)]
    assert labelled_sheet(pictures, ["水彩"]).tobytes() != labelled_sheet(pictures, ["油画"]).tobytes()


def test_wrong_numbers_and_huge_sheets_are_refused():
    with pytest.raises(ValueError, match="got 3 pictures for 4 cells of the grid"):
        comparison_grid([red(8, 8)] * 3, ["1", "2"], ["1", "2"])
    with pytest.raises(ValueError, match="got 2 pictures for 1 labels"):
        labelled_sheet([red(8, 8)] * 2, ["one"])
    with pytest.raises(ValueError, match=f"at most {SHEET_LIMIT_PX} px"):
        labelled_sheet([red(1024, 1024)] * 40, [], 40)
    with pytest.raises(ValueError, match="got 0 pictures"):
        labelled_sheet([], [])
