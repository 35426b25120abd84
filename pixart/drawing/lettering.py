"""The letters of sheets and charts: the pack's own font, so that every machine draws the same picture.

It has Latin, Greek, Cyrillic, Chinese, Japanese and Korean letters, signs of mathematics, and emoji in one colour.
What it lacks is drawn as a box and named in the log.
"""

import functools
import logging
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from PIL import ImageFont

logger = logging.getLogger(__name__)

FONT = Path(__file__).resolve().parent / "fonts" / "pixart-pack-sans.otf"
NAMED_AT_MOST = 50  # missing characters that a run names; a text of another script would fill the log
_PROBE_PX = 20
_NO_CHARACTER = "\uffff"  # is drawn as what every font has for a missing one

_missing: set[str] = set()  # what this run has named


def load_font(size_px: int, texts: Iterable[str] = ()) -> ImageFont.FreeTypeFont:
    """The pack's font. texts: what is to be drawn; what the font lacks of it is logged, each character once a run.

    Raises FileNotFoundError when the font's file is gone.
    """
    _name_missing(texts)
    return _open(size_px)


def compose(text: str) -> str:
    """The text with letters and their marks as one character each, where there is one: the font has no loose parts."""
    return unicodedata.normalize("NFC", text)


@functools.lru_cache(maxsize=16)
def _open(size_px: int) -> ImageFont.FreeTypeFont:
    if not FONT.is_file():
        raise FileNotFoundError(f"Font missing: got no {FONT}, expected the pack's own. Install the pack again.")
    # Basic layout: the other one needs libraries that not every machine has, and would draw otherwise where it has.
    return ImageFont.truetype(str(FONT), size_px, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=4096)
def _has(character: str) -> bool:
    return _drawn(character) != _drawn(_NO_CHARACTER)


def _drawn(character: str) -> tuple[tuple[int, int], bytes]:
    mask = _open(_PROBE_PX).getmask(character)
    return mask.size, bytes(mask)


def _name_missing(texts: Iterable[str]) -> None:
    beyond = {c for text in texts if not text.isascii() for c in compose(text) if not (c.isascii() or c.isspace())}
    found = sorted(c for c in beyond - _missing if not _has(c))[: NAMED_AT_MOST - len(_missing)]
    if not found:
        return
    _missing.update(found)
    names = ", ".join(f"U+{ord(c):04X}" + f" ({c})" * c.isprintable() for c in found)
    end = "" if len(_missing) < NAMED_AT_MOST else ". No others will be named"
    logger.warning("The pack's font has no letter for %s: a box is drawn in its place%s.", names, end)
