"""Which names can be files or folders everywhere: on Windows, macOS and Linux, and in a line of text."""

import re
import unicodedata

LONGEST, LONGEST_BYTES = 100, 200  # of 255 bytes that file systems take; numbers, endings and temporary names are added
_FORBIDDEN = re.compile(r'[\\/:*?"<>|]')
# Windows opens a device under these names, in every folder and behind every ending.
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE | re.DOTALL)
# Control characters, halves of letters, line separators, and marks that are not seen or turn the direction of writing.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # Hangul's fillers and Braille's empty cell
_JOINERS = frozenset("\u200c\u200d")  # not seen either, but part of Persian words and of emoji


def is_device(name: str) -> bool:
    """Whether Windows takes a name for a device, such as NUL or com1.txt."""
    return _DEVICES.fullmatch(name.strip()) is not None


def has_hidden_letters(text: str) -> bool:
    """Whether a text holds control characters, NUL among them, or marks that are not seen or turn the writing."""
    return any(unicodedata.category(letter) in _HIDDEN and letter not in _JOINERS for letter in text)


def is_blank(text: str) -> bool:
    """Whether nothing of a text is seen: spaces, marks without width, and letters that are drawn as nothing."""
    return all(letter.isspace() or letter in _BLANKS or unicodedata.category(letter) in _HIDDEN for letter in text)


def fault_of(name: str) -> str | None:
    """Why a name cannot be that of a file or folder everywhere, in a few words; None for one that can."""
    if not name.strip(". "):
        return "empty, or of dots alone"
    if has_hidden_letters(name):
        return "with characters that are not seen"
    if _FORBIDDEN.search(name):
        return 'with one of \\ / : * ? " < > |'
    if name.startswith("~"):
        return "beginning with ~, which shells take for somebody's home"
    if name != name.strip() or name.endswith("."):
        return "with a space at an end, or a dot at the last"
    if is_device(name):
        return "a device of Windows"
    if len(name) > LONGEST or len(name.encode()) > LONGEST_BYTES:
        return f"longer than {LONGEST} letters or {LONGEST_BYTES} bytes"
    return None
