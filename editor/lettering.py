"""Makes the font of pixart/drawing/fonts, with the letters of sheets and charts, out of Noto fonts.

Only who changes it runs this. fontTools comes with matplotlib, the fonts with Debian 12 and npm (a minute and a half):

    apt-get download fonts-noto-cjk fonts-noto-core
    for package in *.deb; do dpkg -x $package .; done
    npm pack @expo-google-fonts/noto-emoji@0.4.7 && tar xf expo-google-fonts-noto-emoji-0.4.7.tgz
    python dev.py run -m pixart_pack.editor.lettering FOLDER_OF_THE_ABOVE

The same sources give the same bytes under one release of fontTools. The subset is a modified version in the sense of
the Open Font License, so it bears a name of its own, with none of the names reserved or registered for its sources.
"""

import argparse
import hashlib
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fontTools.pens.t2CharStringPen import T2CharStringPen
from fontTools.pens.transformPen import TransformPen
from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont

FONTS = Path(__file__).resolve().parent.parent / "pixart" / "drawing" / "fonts"
FAMILY, FILE_NAME = "PixArt Pack Sans", "pixart-pack-sans.otf"
ASCENT, DESCENT = 950, 250  # of 1000: room for Latin capitals with marks; Noto Sans CJK has 1448 in all
# Drawn as nothing: joiners, marks of direction, and what chooses between a plain and a coloured emoji.
INVISIBLE = (0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFE0E, 0xFE0F, 0xFEFF)
# Chinese, Japanese, Korean: radicals, signs and kana, Hangul, wide forms; of the ideographs, which are half of the
# font's size, those that a national standard has: GB 2312, Big5's first level, JIS X 0213, KS X 1001.
EAST = ((0x2E80, 0x33FF), (0xAC00, 0xD7A3), (0xFE30, 0xFE6F), (0xFF00, 0xFFEF))
IDEOGRAPHS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF))
STANDARDS = {"gb2312": 0xFF, "big5": 0xC6, "euc_jis_2004": 0xFF, "euc_kr": 0xFF}  # the last lead byte that counts
EUROPE = ((0x20, 0x58F), (0x1AB0, 0x1AFF), (0x1C80, 0x1C8F), (0x1D00, 0x1FFF), (0x2000, 0x2BFF), (0x2C60, 0x2C7F))
MORE_LATIN = ((0x2DE0, 0x2E7F), (0xA640, 0xA69F), (0xA700, 0xA7FF), (0xAB30, 0xAB6F), (0xFB00, 0xFB06))
SIGNS = ((0x2000, 0x2BFF),)  # punctuation, arrows, mathematics, boxes, shapes, dingbats
MATHS = (*SIGNS, (0x1D400, 0x1D7FF))
EMOJI = ((0x2600, 0x27BF), (0x2B00, 0x2BFF), (0x1F000, 0x1FAFF))


@dataclass(frozen=True)
class Source:
    """A font, and the ranges of characters taken of it where no source before it has them."""

    file: str
    sha256: str  # its first half
    ranges: tuple[tuple[int, int], ...]

    def find(self, folder: Path) -> Path:
        """Its path. Raises FileNotFoundError, or ValueError for another release of it."""
        path = next(iter(sorted(folder.rglob(self.file))), None)
        if path is None:
            raise FileNotFoundError(f"Font missing: got no {self.file} under {folder}. Fetch it as this module says.")
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()[:32]) != self.sha256:
            raise ValueError(f"Another release of {self.file}: got {found}, expected {self.sha256}. Fetch that one.")
        return path


EASTERN = Source("NotoSansCJK-Regular.ttc", "b76b0433203017ca80401b2ee0dd6935", (*EAST, *IDEOGRAPHS, *SIGNS))
SOURCES = (
    Source(
        "NotoSans-Regular.ttf",
        "89c3c497f618fdaa0b2d1e98fef93582",
        (*EUROPE, *MORE_LATIN),
    ),
    EASTERN,
    Source("NotoSansMath-Regular.ttf", "8242bd1e55368b27e32455260754cf9a", MATHS),
    Source("NotoSansSymbols-Regular.ttf", "24b615ceb7d50a2c09060664ca9e24a1", SIGNS),
    Source("NotoSansSymbols2-Regular.ttf", "876598db5f1e3bef2bc77c4d94c5b0d5", SIGNS),
    Source("NotoEmoji_400Regular.ttf", "24aaa2a20c9c06ffe9bf04284bfd1f14", EMOJI),
)
SIMPLIFIED = 2  # the face of the collection that draws shared ideographs as in mainland China


def open_source(source: Source, folder: Path) -> TTFont:
    number = SIMPLIFIED if source is EASTERN else -1
    return TTFont(source.find(folder), fontNumber=number, recalcTimestamp=False)


def rare_ideographs() -> set[int]:
    """Those that none of the standards has."""

    def is_common(code: int) -> bool:
        return any(0xA0 < _lead_byte(code, name) <= last for name, last in STANDARDS.items())

    return {code for first, last in IDEOGRAPHS for code in range(first, last + 1) if not is_common(code)}


def _lead_byte(code: int, encoding: str) -> int:
    try:
        return chr(code).encode(encoding)[0]
    except UnicodeEncodeError:
        return 0


def share_out(fonts: Iterable[TTFont]) -> list[list[int]]:
    """The characters that each source gives: those of its ranges that none before it has."""
    taken, shares = {*INVISIBLE, *rare_ideographs()}, []
    for source, font in zip(SOURCES, fonts, strict=True):
        wanted = {code for first, last in source.ranges for code in range(first, last + 1)}
        shares.append(sorted((wanted & font.getBestCmap().keys()) - taken))
        taken.update(shares[-1])
    return shares


def cut(font: TTFont, codes: Iterable[int]) -> None:
    """Leaves the glyphs of these characters, without hints and layout: at 12 px they make no difference to see."""
    options = Options(hinting=False, layout_features=[], name_IDs=[], notdef_outline=True)
    options.drop_tables += ["BASE", "GDEF", "GPOS", "GSUB", "VORG", "vhea", "vmtx", "DSIG"]
    subsetter = Subsetter(options)
    subsetter.populate(unicodes=codes)
    subsetter.subset(font)


class Appender:
    """Puts glyphs of other fonts, as cubic curves, behind those of a CID-keyed font."""

    def __init__(self, font: TTFont):
        self.font, self.top = font, font["CFF "].cff.topDictIndex[0]
        self.order = list(font.getGlyphOrder())
        self.free = iter(sorted({f"cid{number:05d}" for number in range(1, 0xFFFF)}.difference(self.order)))
        self.private = self.top.FDArray[0].Private
        self.cmap: dict[int, str] = dict(font.getBestCmap())

    def add(self, codes: Iterable[int], source: TTFont | None) -> None:
        """Draws characters of a source, which share a glyph where they do there; without one, an empty glyph."""
        glyphs, names = (source.getGlyphSet(), source.getBestCmap()) if source else ({}, {})
        scale = 1000 / source["head"].unitsPerEm if source else 1
        done: dict[str, str] = {}
        for code in codes:
            name = names.get(code, "")
            if name not in done:
                width = round(glyphs[name].width * scale) if name else 0
                pen = T2CharStringPen(width - self.private.nominalWidthX, glyphs)
                if name:
                    glyphs[name].draw(TransformPen(pen, (scale, 0, 0, scale, 0, 0)))
                done[name] = self._append(pen, width)
            self.cmap[code] = done[name]

    def _append(self, pen: T2CharStringPen, width: int) -> str:
        name = next(self.free)
        strings = self.top.CharStrings
        drawn = pen.getCharString(self.private, self.top.GlobalSubrs)
        strings.charStrings[name] = len(strings.charStringsIndex)
        strings.charStringsIndex.append(drawn)
        self.top.charset.append(name)
        self.top.FDSelect.gidArray.append(0)
        self.order.append(name)
        bounds = drawn.calcBounds(None)
        self.font["hmtx"].metrics[name] = (width, round(bounds[0]) if bounds else 0)
        return name

    def finish(self) -> None:
        """Writes the tables that count the glyphs and map the characters to them."""
        self.top.CIDCount = 0xFFFF
        self.font.setGlyphOrder(self.order)
        for table in self.font["cmap"].tables:
            wide = table.format == 12
            if wide or table.format == 4:
                table.cmap = {code: name for code, name in self.cmap.items() if wide or code <= 0xFFFF}
        self.font["cmap"].tables = [table for table in self.font["cmap"].tables if table.format in (4, 12)]


def describe(font: TTFont, copyrights: Iterable[str]) -> None:
    """The names, the licence and the height of a line."""
    names = font["name"]
    names.names = []
    script_name = FAMILY.replace(" ", "") + "-Regular"
    licence = "This Font Software is licensed under the SIL Open Font License, Version 1.1."
    texts = {0: "; ".join(copyrights), 1: FAMILY, 2: "Regular", 3: f"1.0;{script_name}", 4: FAMILY}
    texts |= {5: "Version 1.0", 6: script_name, 13: licence, 14: "https://openfontlicense.org"}
    for number, text in texts.items():
        names.setName(text, number, 3, 1, 0x409)
    cff = font["CFF "].cff
    cff.fontNames = [script_name]
    top = cff.topDictIndex[0]
    top.FullName, top.FamilyName, top.Notice = FAMILY, FAMILY, licence
    for number, part in enumerate(top.FDArray):
        part.FontName = f"{script_name}-{number}"
    head, os2 = font["hhea"], font["OS/2"]
    head.ascent, head.descent, head.lineGap = ASCENT, -DESCENT, 0
    os2.sTypoAscender, os2.sTypoDescender, os2.sTypoLineGap = ASCENT, -DESCENT, 0
    os2.usWinAscent, os2.usWinDescent, os2.achVendID = ASCENT, DESCENT, "    "
    font["head"].fontRevision = 1.0


def build(folder: Path) -> TTFont:
    """The font of the pack, from the fonts under this folder."""
    fonts = [open_source(source, folder) for source in SOURCES]
    copyrights = dict.fromkeys(font["name"].getDebugName(0) for font in fonts)
    shares = share_out(fonts)
    east = SOURCES.index(EASTERN)
    cut(fonts[east], shares[east])
    appender = Appender(fonts[east])
    for source, font, codes in zip(SOURCES, fonts, shares, strict=True):
        logging.info("%6d characters of %s", len(codes), source.file)
        if source is not EASTERN:
            appender.add(codes, font)
    appender.add(INVISIBLE, None)
    appender.finish()
    describe(fonts[east], copyrights)
    return fonts[east]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the packages of the fonts were unpacked")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    path = FONTS / FILE_NAME
    build(parser.parse_args().folder).save(path)
    logging.info("%s: %.1f MB", path, path.stat().st_size / 1e6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
