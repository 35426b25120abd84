"""Which translations were made from the English texts as they are: a line for each text in `locales/made_from.json`.

A line is a hash of the text and its place, and for each language one of its translation, behind a - where that is
stale. A new or changed text is entered where its translation is new too, or is that of the same text elsewhere. A
translation that was there for an older text is stale, and is named until it is made anew, or found to hold.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

LANGUAGES = ("zh", "ja", "ko", "ru", "fr", "es")
FILE = "made_from.json"
STALE = "-"
_LETTERS = 6


def texts_of(definitions: dict) -> Iterator[tuple[str, str]]:
    """(place, text) of each title, description and tooltip of a nodeDefs.json that is not empty."""
    for name, node in definitions.items():
        found = {f"{name}.{part}": node.get(part) for part in ("display_name", "description")}
        for kind in ("inputs", "outputs"):
            found |= {f"{name}.{kind}.{part}": entry.get("tooltip") for part, entry in node.get(kind, {}).items()}
        yield from ((place, text) for place, text in found.items() if text)


def stale_places(english: dict, lines: dict[str, str]) -> list[str]:
    """`language: place` for each text that is not the one which its translation was made from."""
    return [
        f"{language}: {place}"
        for place, text in texts_of(english)
        for language, mark in zip(LANGUAGES, _marks(lines, place, text), strict=True)
        if mark.startswith(STALE)
    ]


def record(english: dict, translated: dict[str, dict], lines: dict[str, str], holds: bool = False) -> dict[str, str]:
    """The lines for the texts as they are. translated: nodeDefs.json by language.

    holds: enter also the translations that were there before their English text, since they were looked at.
    """
    columns = [
        _column(english, dict(texts_of(translated[each])), lines, index, holds) for index, each in enumerate(LANGUAGES)
    ]
    keys = [_key(place, text) for place, text in texts_of(english)]
    return dict(sorted((key, " ".join(marks)) for key, *marks in zip(keys, *columns, strict=True)))


def _column(english: dict, given: dict[str, str], lines: dict[str, str], index: int, holds: bool) -> list[str]:
    """The marks of one language, by the order of the English texts."""
    known = {line.split()[index].lstrip(STALE) for line in lines.values()}
    places = list(texts_of(english))
    before = [_marks(lines, place, text)[index] for place, text in places]
    pairs = {
        (text, given.get(place))
        for (place, text), mark in zip(places, before, strict=True)
        if not mark.startswith(STALE)
    }
    found = []
    for (place, text), mark in zip(places, before, strict=True):
        own = given.get(place)
        is_made = own and (holds or (text, own) in pairs or not mark.startswith(STALE) or _hash(own) not in known)
        found.append(_hash(own) if is_made else f"{STALE}{_hash(own) if own else ''}")
    return found


def _marks(lines: dict[str, str], place: str, text: str) -> list[str]:
    line = lines.get(_key(place, text))
    return line.split() if line else [STALE] * len(LANGUAGES)


def read_lines(locales: Path) -> dict[str, str]:
    """The file's lines, none where there is no file."""
    path = locales / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_lines(locales: Path, lines: dict[str, str]) -> None:
    (locales / FILE).write_text(json.dumps(lines, indent=0) + "\n", encoding="utf-8")


def _key(place: str, text: str) -> str:
    return _hash(f"{place}\n{text}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_LETTERS]
