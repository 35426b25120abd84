"""A file of columns: a safetensors file with one tensor a column, mapped where a column is asked for whole.

Rows are read and not mapped: of each row that is looked at in a map the system would keep its surroundings in the
process's memory.
"""

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock

import numpy as np

from ...files.documents import parse_json
from ...files.regular import open_regular

TYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I32": np.int32, "I64": np.int64, "F64": np.float64}
_HEADER_BYTES = 2**20  # of some dozen columns, two kilobytes


class ColumnFile(Mapping[str, np.ndarray]):
    """Columns by name, each (N, ...). Raises FileNotFoundError, and ValueError for another content."""

    def __init__(self, path: Path):
        self.path = path
        self._file, self._lock, self._map = open_regular(path), Lock(), None
        size = self._file.seek(0, os.SEEK_END)
        length = int.from_bytes(self._read(0, 8), "little")
        if length > min(_HEADER_BYTES, size):
            raise ValueError("no header of columns")
        self._start = 8 + length
        try:
            header = parse_json(self._read(8, length))
            self._forms = {name: _form(entry) for name, entry in header.items() if name != "__metadata__"}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("no header of columns") from error
        if any(self._start + end > size for _, _, (_, end) in self._forms.values()):
            raise ValueError("fewer bytes than its columns have")

    def __iter__(self) -> Iterator[str]:
        return iter(self._forms)

    def __len__(self) -> int:
        return len(self._forms)

    def __getitem__(self, name: str) -> np.ndarray:
        """The whole column, of which those pages take memory that are looked at."""
        kind, shape, (start, _) = self._forms[name]
        if not math.prod(shape):
            return np.zeros(shape, kind)
        if self._map is None:  # of the file as it was opened, whatever has its name by now
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, kind, math.prod(shape), self._start + start).reshape(shape)

    def read(self, name: str, first: int, last: int) -> np.ndarray:
        """The rows from the first to before the last."""
        kind, shape, (start, _) = self._forms[name]
        first, last = max(first, 0), min(last, shape[0])
        each = kind.itemsize * math.prod(shape[1:])
        data = self._read(self._start + start + first * each, max(last - first, 0) * each)
        return np.frombuffer(data, kind).reshape(-1, *shape[1:])

    def _read(self, place: int, size: int) -> bytes:
        """So many bytes. Several processes may have the file from one, so that its own place says nothing."""
        if hasattr(os, "pread"):
            data = os.pread(self._file.fileno(), size, place)
        else:
            with self._lock:
                self._file.seek(place)
                data = self._file.read(size)
        if len(data) != size:
            raise ValueError("fewer bytes than its columns have")
        return data


def _form(entry: dict) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    kind, shape, (start, end) = np.dtype(TYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
    if not shape or not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError("no header of columns")
    if end - start != kind.itemsize * math.prod(shape):
        raise ValueError("columns of another length")
    return kind, shape, (start, end)
