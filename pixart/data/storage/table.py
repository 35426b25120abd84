"""Records of a dataset, and a table of them in columns: about a hundred bytes each beside their texts."""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from ..pictures import ArchivePicture, FilePicture, Picture, RowPicture
from ..variety.masks import AlphaPicture
from ..variety.views import ViewVariety

_NONE, _FILE, _ARCHIVE, _ROW, _OBJECT = range(5)
_ALPHA = 8  # added to the kind of the picture whose alpha channel is meant


@dataclass(frozen=True)
class Record:
    """A picture and its caption. name: what tables and errors call it. caption: None when there is none.

    problem: what the source could not make out, such as a file that is missing. is_prior: see examples.Example.
    number: in the whole source, where this is a share of it. mask: a grey picture of what is to be learned, or None.
    others: further captions that the source has. captions: all that are to be encoded, where that is not the one.
    views: in how many views the picture is to be encoded, None for the plain one. repeats: how often it is shown in an
    epoch. weight: of its loss.
    """

    name: str
    picture: Picture | None
    caption: str | None
    control: Picture | None = None
    is_prior: bool = False
    problem: str | None = None
    number: int | None = None
    mask: Picture | None = None
    others: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    views: ViewVariety | None = None
    repeats: float = 1.0
    weight: float = 1.0


class RecordTable(Sequence[Record]):
    """Records by number, made anew when they are asked for. It grows by `add` alone."""

    def __init__(self, records: Iterable[Record] = ()):
        self._names, self._captions = _Texts(), _Texts()
        self._sparse: dict[str, dict[int, str]] = {"problem": {}, "others": {}}
        self._several = _Texts()  # captions, as JSON
        self._pictures = {part: _Pictures() for part in ("picture", "control", "mask")}
        self._priors, self._numbers = array("b"), array("q")
        self._factors = {name: array("d") for name in ("repeats", "weight")}
        self._views, self._view_numbers = array("h"), dict[ViewVariety | None, int]()
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Add one at the end."""
        number = len(self)
        self._names.add(record.name)
        self._captions.add(record.caption)
        self._several.add(json.dumps(record.captions) if record.captions else None)
        if record.problem is not None:
            self._sparse["problem"][number] = record.problem
        if record.others:
            self._sparse["others"][number] = json.dumps(record.others)
        for part, pictures in self._pictures.items():
            pictures.add(number, getattr(record, part))
        self._priors.append(record.is_prior)
        self._numbers.append(-1 if record.number is None else record.number)
        for name, factors in self._factors.items():
            factors.append(getattr(record, name))
        self._views.append(self._view_numbers.setdefault(record.views, len(self._view_numbers)))

    def __len__(self) -> int:
        return len(self._priors)

    @overload
    def __getitem__(self, place: int) -> Record: ...

    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]  # raises IndexError, and counts from the end for negative ones
        several, others = self._several[number], self._sparse["others"].get(number)
        return Record(
            name=self._names[number] or "",
            caption=self._captions[number],
            problem=self._sparse["problem"].get(number),
            others=tuple(json.loads(others)) if others else (),
            captions=tuple(json.loads(several)) if several else (),
            is_prior=bool(self._priors[number]),
            number=None if self._numbers[number] < 0 else self._numbers[number],
            views=list(self._view_numbers)[self._views[number]],
            **{part: pictures[number] for part, pictures in self._pictures.items()},
            **{name: factors[number] for name, factors in self._factors.items()},
        )

    def __add__(self, other: Iterable[Record]) -> "RecordTable":
        return RecordTable(record for part in (self, other) for record in part)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None

    def __iter__(self) -> Iterator[Record]:
        return (self[number] for number in range(len(self)))


class _Texts:
    """Texts by number behind each other; None where there is none."""

    def __init__(self):
        self._bytes, self._ends, self._absent = bytearray(), array("q"), bytearray()

    def add(self, text: str | None) -> None:
        self._bytes += (text or "").encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))
        self._absent.append(text is None)

    def __getitem__(self, number: int) -> str | None:
        if self._absent[number]:
            return None
        start = self._ends[number - 1] if number else 0
        return self._bytes[start : self._ends[number]].decode("utf-8", "surrogatepass")


class _Pictures:
    """Where pictures are kept, by number; empty until the first one that there is."""

    def __init__(self):
        self._kinds, self._owners = bytearray(), array("i")
        self._offsets, self._sizes = array("q"), array("q")
        self._names = _Texts()
        self._owner_numbers: dict = {}  # folders, archives, tables: what many pictures have in common
        self._owners_by_number: list = []
        self._objects: list[Picture] = []

    def add(self, number: int, picture: Picture | None) -> None:
        if picture is None and not self._kinds:
            return
        while len(self._kinds) < number:
            self._append(_NONE)
        alpha = _ALPHA if isinstance(picture, AlphaPicture) else 0
        self._append(*self._place(picture.picture if alpha else picture), alpha=alpha)

    def _place(self, picture: Picture | None) -> tuple:
        """(kind, owner, name, two numbers)."""
        if picture is None:
            return (_NONE,)
        if type(picture) is FilePicture:
            folder, name = os.path.split(picture.path)
            return _FILE, self._owner(folder), name
        if type(picture) is ArchivePicture:
            return _ARCHIVE, self._owner(picture.path), None, picture.offset, picture.size
        if type(picture) is RowPicture:
            owner = _Rows(picture.rows, picture.column, picture.folder, picture.confined)
            return _ROW, self._owner(owner), None, picture.index
        self._objects.append(picture)
        return _OBJECT, len(self._objects) - 1

    def _owner(self, owner) -> int:
        number = self._owner_numbers.setdefault(owner, len(self._owner_numbers))
        if number == len(self._owners_by_number):
            self._owners_by_number.append(owner)
        return number

    def _append(self, kind, owner=-1, name=None, offset=0, size=0, alpha=0) -> None:
        self._kinds.append(kind + alpha)
        self._owners.append(owner)
        self._names.add(name)
        self._offsets.append(offset)
        self._sizes.append(size)

    def __getitem__(self, number: int) -> Picture | None:
        kind = self._kinds[number] if number < len(self._kinds) else _NONE
        if kind >= _ALPHA:
            return AlphaPicture(self._made(kind - _ALPHA, number))
        return self._made(kind, number)

    def _made(self, kind: int, number: int) -> Picture | None:
        if kind == _NONE:
            return None
        if kind == _OBJECT:
            return self._objects[self._owners[number]]
        owner = self._owners_by_number[self._owners[number]]
        if kind == _FILE:
            return FilePicture(Path(owner, self._names[number]))
        if kind == _ARCHIVE:
            return ArchivePicture(owner, self._offsets[number], self._sizes[number])
        return RowPicture(owner.rows, self._offsets[number], owner.column, owner.folder, owner.confined)


class _Rows:
    """What the pictures of one table have in common; the same for the same table."""

    def __init__(self, rows, column: str, folder: Path, confined: bool):
        self.rows, self.column, self.folder, self.confined = rows, column, folder, confined
        self._key = (id(rows), column, folder, confined)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rows) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)
