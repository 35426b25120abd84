"""Shows text from outside (names in files, keys, values, other libraries' messages) inside an error or a log line."""

import reprlib
from collections.abc import Collection
from itertools import islice
from pathlib import PurePath

_BITS = 256  # of the longest integer that is written out
# Whose repr is short to make, whatever the value; of all else that is no container, the type is shown.
_PLAIN = (bool, float, complex, type(None), type(...), type, PurePath)


def shorten(value: object, length: int = 80) -> str:
    """One printable line of at most `length` characters (at least 8) that shows a value from outside.

    Text and containers look as in Python, quotes included; an exception shows its message without quotes, and an
    object of another kind its type. Line breaks, control characters and those that turn the direction of writing are
    escaped. What is too long keeps its beginning and its end. The cost is bounded, however large or deep the value is.
    """
    if isinstance(value, BaseException):
        return _cut(_escape(_ends(str(value), length)), length)
    if isinstance(value, str | bytes | bytearray):
        return _cut(repr(_ends(value, length)), length)
    return _cut(_escape(_Bounded(length).repr(value)), length)


def plain(text: str, length: int = 80) -> str:
    """As shorten, without quotes: for what is no value, such as another program's message."""
    return _cut(_escape(_ends(text, length)), length)


def list_names(names: Collection, most: int = 8) -> str:
    """Names from outside between commas, without quotes: the first `most` of them, each shortened, and how many more.

    Those which a person may choose from need a larger `most` than those that are only shown.
    """
    shown = [_cut(_escape(_ends(str(name), 60)), 60) for name in islice(names, most)]
    return ", ".join([*shown, *([f"and {len(names) - most} more"] if len(names) > most else [])])


class _Bounded(reprlib.Repr):
    """Python's notation of a value with bounded depth, breadth and lengths."""

    def __init__(self, length: int):
        super().__init__()
        self.maxlevel, self.length = 4, length
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = self.maxarray = (
            self.maxdict
        ) = 8

    def repr_str(self, x, level):
        return _cut(repr(_ends(x, self.length)), self.length)

    repr_bytes = repr_bytearray = repr_str

    def repr_int(self, x, level):
        return repr(x) if x.bit_length() <= _BITS else f"<int of {x.bit_length()} bits>"

    def repr_instance(self, x, level):
        if isinstance(x, str | bytes | bytearray):
            return self.repr_str(x, level)
        return repr(x) if isinstance(x, _PLAIN) else f"<{type(x).__name__}>"


def _ends(text, length: int):
    """Text without the middle that will not be shown; still longer than `length` where it was."""
    return text if len(text) <= 2 * length else text[:length] + text[-length:]


def _escape(text: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _cut(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    tail = (length - 3) // 3
    return f"{text[: length - 3 - tail]}...{text[-tail:]}"
