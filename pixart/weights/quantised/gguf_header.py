"""The header of a GGUF file, read within bounds before any of its tensors: names, sizes, places and texts."""

import math
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from ...quoting import shorten

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_TENSORS = _MOST_FIELDS = 10**5
_MOST_ITEMS = 2**22  # of all lists of texts: a vocabulary has some ten thousands
_MOST_TEXT = 2**20
_MOST_NAME = 2**10
_MOST_DIMENSIONS = 8
_MOST_NUMBERS = 2**40
_ALIGNMENT = "general.alignment"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_SHORT_LIST = 64  # numbers: longer lists are left out


@dataclass(frozen=True)
class StoredBlocks:
    """A tensor of the file. type_number: of its blocks. shape: rows first. place: of its first byte in the file."""

    name: str
    type_number: int
    shape: tuple[int, ...]
    place: int


@dataclass(frozen=True)
class Header:
    """fields: name -> text, number or short list of numbers. tensors: name -> where it lies."""

    fields: dict[str, object]
    tensors: dict[str, StoredBlocks]


def read_header(path: Path) -> Header:
    """Raises ValueError naming the file for a header that is damaged, beyond a bound, or of a version not known."""
    with path.open("rb") as file:
        return _Reader(file, path).read()


class _Reader:
    def __init__(self, file: BufferedReader, path: Path):
        self.file, self.path, self.size = file, path, path.stat().st_size
        self.items = 0

    def read(self) -> Header:
        if self._bytes(4) != MAGIC:
            raise self._damaged("another beginning")
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(
                f"Unknown GGUF version: got {version} in {shorten(self.path.name)}, expected 2 or 3, little-endian. "
                f"Convert the model again with a newer program."
            )
        tensor_count, field_count = self._number("Q"), self._number("Q")
        if tensor_count > _MOST_TENSORS or field_count > _MOST_FIELDS:
            raise self._damaged(f"{tensor_count} tensors and {field_count} fields")
        fields = {}
        for _ in range(field_count):
            name = self._text(_MOST_NAME)
            if name in fields:
                raise self._damaged(f"the field {shorten(name)} twice")
            fields[name] = self._value(self._number("I"), 0)
        described = [self._describe() for _ in range(tensor_count)]
        alignment = fields.get(_ALIGNMENT, 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise self._damaged(f"the alignment {shorten(alignment)}")
        start = -(-self.file.tell() // alignment) * alignment
        tensors = {}
        for name, type_number, shape, offset in described:
            if name in tensors:
                raise self._damaged(f"the tensor {shorten(name)} twice")
            if start + offset > self.size:
                raise self._damaged(f"the place of {shorten(name)} behind the end")
            tensors[name] = StoredBlocks(name, type_number, shape, start + offset)
        return Header(fields, tensors)

    def _describe(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self._text(_MOST_NAME), self._number("I")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise self._damaged(f"{dimensions} dimensions of {shorten(name)}")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]  # the file has columns first
        if 0 in shape or math.prod(shape) > _MOST_NUMBERS:
            raise self._damaged(f"the shape {shorten(shape)} of {shorten(name)}")
        return name, self._number("I"), shape, self._number("Q")

    def _value(self, kind: int, depth: int) -> object:
        if kind == _TEXT:
            return self._text(_MOST_TEXT)
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _LIST or depth > 2:
            raise self._damaged(f"a value of type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            form = _SCALARS[inner]
            size = count * struct.calcsize(f"<{form}")
            if count <= _SHORT_LIST:
                return [self._number(form) for _ in range(count)]
            self._skip(size)
            return None
        self.items += count
        if self.items > _MOST_ITEMS:
            raise self._damaged(f"lists of {self.items} texts")
        for _ in range(count):
            if inner == _TEXT:
                self._skip(self._number("Q"))
            else:
                self._value(inner, depth + 1)
        return None

    def _number(self, form: str) -> int | float | bool:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))[0]

    def _text(self, most: int) -> str:
        length = self._number("Q")
        if length > most:
            raise self._damaged(f"a text of {length} bytes")
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a text that is not UTF-8") from error

    def _skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise self._damaged("a list behind the end of the file")
        self.file.seek(count, 1)

    def _bytes(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size - self.file.tell() else b""
        if len(data) < count:
            raise self._damaged("the end of the file within the header")
        return data

    def _damaged(self, got: str) -> ValueError:
        return ValueError(
            f"Damaged GGUF file: got {got} in {shorten(self.path.name)}, expected a complete header. Download the file "
            f"again from a source that you trust."
        )
