"""Letters: the pack's own font has them, whatever fonts the machine has."""

import logging
import unicodedata

import pytest
from PIL import Image, ImageFont

from pixart_pack.pixart.drawing import lettering
from pixart_pack.pixart.drawing.lettering import FONT, load_font
from pixart_pack.pixart.drawing.sheets import labelled_sheet, wrap

TEXTS = {
    "Chinese": "水彩画里一只戴红帽子的猫，在雨中的街道上",
    "traditional Chinese": "水彩畫裡戴紅帽子的貓，鬱鬱蔥蔥",
    "Japanese": "桜の下で本を読むネコ、辻と峠、ｶﾀｶﾅ「々」",
    "Korean": "비 오는 거리의 고양이 똠방각하 햏 뷁",
    "Greek": "μια γάτα στη βροχή, ᾧ",
    "Russian": "Кошка под дождём, їжак, ґанок",
    "Latin": "Żółć, ångström, ğışç, Việt Nam Ễ, ẞ, œuvre, ǆ",
    "signs": "“…” – — • ‹› € ₩ ← → ⇒ ≤ ≥ ≠ ± × ∑ ∫ √ ∞ ∈ ∀ ½ ² ₃ ½ ℃ № ™ ■ ● ★ ✓ 𝑥",
    "emoji": "🐱🌧🎨🚀😀☔❤",
}
ARABIC = "قطة"
# Of Big5 the first level, which is what most texts have.
CHARACTER_SETS = {"gb2312": (7445, 0xFF), "euc_jis_2004": (6879, 0xFF), "euc_kr": (8226, 0xFF), "big5": (5808, 0xC6)}


@pytest.fixture(autouse=True)
def nothing_named_before(monkeypatch):
    monkeypatch.setattr(lettering, "_missing", set())


def drawn(font, text):
    mask = font.getmask(text)
    return mask.size, bytes(mask)


@pytest.mark.parametrize("script", TEXTS)
def test_every_letter_has_a_shape_of_its_own(script):
    font = load_font(48)
    box = drawn(font, "\uffff")
    assert any(box[1]), "a missing letter is not to be seen"
    letters = sorted(set(unicodedata.normalize("NFC", TEXTS[script])) - set(" \u3000"))
    shapes = {letter: drawn(font, letter) for letter in letters}
    assert [letter for letter, shape in shapes.items() if shape == box or not any(shape[1])] == []
    assert len(set(shapes.values())) == len(letters)


@pytest.mark.parametrize("encoding", CHARACTER_SETS)
def test_the_character_sets_of_east_asia_are_whole(encoding):
    size, last = CHARACTER_SETS[encoding]
    pairs = ((first, second) for first in range(0x81, last) for second in range(0x40, 0xFF))
    found = {bytes(pair).decode(encoding, "ignore") for pair in pairs}
    characters = sorted(c for c in found if len(c) == 1 and not c.isascii() and not c.isspace())
    assert len(characters) > 0.97 * size
    missing = [c for c in characters[::8] if not lettering._has(c)]
    assert missing == []


def test_no_font_of_the_machine_is_opened(monkeypatch):
    opened, real = [], ImageFont.truetype
    monkeypatch.setattr(ImageFont, "truetype", lambda name, *a, **k: opened.append(name) or real(name, *a, **k))
    lettering._open.cache_clear()
    load_font(17, ["水彩"])
    load_font(17, ["油画"])
    assert set(opened) == {str(FONT)} and len(opened) <= 2  # at this size, and at that of the search for missing ones


def test_what_is_missing_is_a_box_and_named_once(caplog):
    caplog.set_level(logging.WARNING)
    font = load_font(32, [f"a cat, {ARABIC}, 水彩", ARABIC])
    load_font(20, [ARABIC])
    labelled_sheet([Image.new("RGB", (64, 64), "red")], [ARABIC])
    (record,) = caplog.records
    assert all(f"U+{ord(letter):04X} ({letter})" in record.message for letter in ARABIC) and "水" not in record.message
    assert {drawn(font, letter) for letter in ARABIC} == {drawn(font, "\uffff")}


def test_the_log_names_a_bounded_number_of_missing_letters(caplog):
    caplog.set_level(logging.WARNING)
    for first in range(0x12000, 0x12400, 0x40):  # cuneiform
        load_font(20, ["".join(map(chr, range(first, first + 0x40)))])
    assert sum(record.message.count("U+") for record in caplog.records) == lettering.NAMED_AT_MOST
    assert "No others will be named" in caplog.records[-1].message


def test_joiners_and_spaces_are_not_missing_and_draw_nothing(caplog):
    invisible = "\u200b\u200d\ufe0e\ufe0f\u00ad\ufeff"
    font = load_font(24, [invisible + "\t\n\u3000\u00a0\u2003"])
    assert not caplog.records
    assert font.getlength(invisible) == 0 and not any(drawn(font, invisible)[1])


def test_letters_in_parts_are_drawn_whole(caplog):
    font = load_font(24, [unicodedata.normalize("NFD", "ガリé각")])
    assert not caplog.records
    assert wrap(unicodedata.normalize("NFD", "ガリé각"), font, 500) == "ガリé각"


def test_a_lost_font_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(lettering, "FONT", tmp_path / "gone.otf")
    with pytest.raises(FileNotFoundError, match=r"Font missing: got no .*gone\.otf"):
        load_font(1009)


def test_the_font_is_small_free_and_bears_its_own_name():
    assert FONT.stat().st_size <= 10_000_000
    licence = (FONT.parent / "OFL.txt").read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence
    name = load_font(20).getname()
    assert name == ("PixArt Pack Sans", "Regular") and name[0] in licence
    assert not any(reserved in name[0] for reserved in ("Noto", "Source"))
