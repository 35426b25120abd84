"""The list of an encoded dataset as columns of numbers in one file, mapped into memory and shared between processes.

The file is a safetensors file: a header, then one tensor a column (see columns.ColumnFile), so that a process holds
nothing of it but what it looks at. Names and captions lie behind each other in one column of bytes, with a column of
where each ends.
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ...config import LATENT_DOWNSCALE
from ...files.atomic import write_atomically
from ...files.inside import is_plain_name
from ..buckets import Bins, id_type
from ..identity import Digest
from .columns import TYPES, ColumnFile
from .rows import FURTHER, GROUP, KEY_BYTES, MASK, PARTS, RECORD, TEXTS, Rows
from .shards import ShardFolder

VERSION = 1  # of keys and lists: raised when the same settings come to mean something else
VARIED_VERSION = 2  # of lists with what the first version would not see
MANIFEST, INDEX_SUFFIX = "features.json", ".index"
_ROWS_AT_ONCE = 2**16
_MARKS = ("aspect_ratio", "is_prior")
_NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}
# column: (its type, its shape behind the rows); the last ones are not by rows
_ROWS = {
    **{part: (np.uint8, (KEY_BYTES,)) for part in PARTS},
    **{f"{part}_shard": (np.int32, ()) for part in PARTS},
    **{f"{text}_end": (np.int64, ()) for text in TEXTS},
    "size_px": (np.int32, (2,)),
    "aspect_ratio": (np.float64, ()),
    "is_prior": (np.uint8, ()),
    "has_deviation": (np.uint8, ()),
}
_OTHERS = {
    **{f"{text}_bytes": (np.uint8, ()) for text in TEXTS},
    "sizes": (np.int32, (2,)),
    "shard_bytes": (np.int64, ()),
    "shard_names": (np.uint8, ()),
    "null": (np.uint8, (KEY_BYTES,)),
    "null_shard": (np.int32, ()),
}
_FURTHER = {name: (np.dtype(kind).type, ()) for name, (kind, _) in FURTHER.items()}
_FURTHER |= {MASK: (np.uint8, (KEY_BYTES,)), f"{MASK}_shard": (np.int32, ())}
VARYING = sorted({*FURTHER, MASK} - {RECORD})  # which change what a training sees


class Index:
    """Rows of an encoded dataset by number: where each one's tensors lie, and all else that is known of it.

    columns: as above, and `bin` of 16 or 32 bits. path: of the file that they are mapped from; None in memory.
    Raises ValueError for columns that do not fit each other.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], path: Path | None = None):
        self.columns, self.path = columns if path else dict(columns), path
        _check(self)
        self.bins = Bins(columns["sizes"], columns["bin"])
        self.is_prior = self.columns["is_prior"].view(bool)
        self.parts = (*PARTS, MASK) if MASK in columns else PARTS
        self.shards = bytes(columns["shard_names"]).decode().split("\n") if len(columns["shard_names"]) else []
        wrong = [name for name in self.shards if not is_plain_name(name)]
        if wrong or len(self.shards) != len(columns["shard_bytes"]):
            raise ValueError("names of files that are none")

    @property
    def null_key(self) -> str:
        """The key of the empty caption."""
        return self.columns["null"].tobytes().hex()

    @property
    def null_place(self) -> tuple[str, str]:
        """(shard, key) of the empty caption."""
        return self.shards[int(self.columns["null_shard"][0])], self.null_key

    @property
    def version(self) -> int:
        """The first version that reads all that is in it."""
        return VARIED_VERSION if any(name in self.columns for name in VARYING) else VERSION

    def __len__(self) -> int:
        return len(self.columns["bin"])

    def __reduce__(self):
        return (open_index, (self.path,)) if self.path else (Index, (self.columns,))

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Some rows of a column, without the others."""
        is_file = isinstance(self.columns, ColumnFile)
        return self.columns.read(name, first, last) if is_file else self.columns[name][first:last]

    def value(self, name: str, row: int):
        """What a column has in a row."""
        return self.rows(name, row, row + 1)[0]

    def extent(self, name: str) -> tuple[int, int]:
        """(least, greatest) of a column."""
        blocks = [self.rows(name, each.start, each.stop) for each in _blocks(len(self.columns[name]))]
        return min(int(block.min()) for block in blocks), max(int(block.max()) for block in blocks)

    def text(self, which: str, row: int) -> str:
        """The `name` or the `text` of a row."""
        return self.raw_text(which, row).decode("utf-8", "replace")

    def raw_text(self, which: str, row: int) -> bytes:
        """The same in UTF-8."""
        ends = self.rows(f"{which}_end", max(row - 1, 0), row + 1)
        return self.rows(f"{which}_bytes", int(ends[0]) if row else 0, int(ends[-1])).tobytes()

    def place(self, part: str, row: int) -> tuple[str, str] | None:
        """(shard, key) of a part of a row; None for a hint that there is not."""
        shard = int(self.value(f"{part}_shard", row))
        return None if shard < 0 else (self.shards[shard], self.value(part, row).tobytes().hex())

    def lost(self, folder: Path) -> np.ndarray:
        """(S,) bool: which of the shards are not in the folder as they were when this was written."""
        with os.scandir(folder) as entries:
            found = {entry.name: entry for entry in entries}
        sizes = self.columns["shard_bytes"].tolist()
        there = (
            name in found and found[name].stat().st_size == size for name, size in zip(self.shards, sizes, strict=True)
        )
        return ~np.fromiter(there, bool, len(sizes))

    def count_entries(self, shards: np.ndarray | None = None) -> int:
        """How many different entries the rows name, of all shards or of those that are marked."""
        keys = []
        for part in (*self.parts, "null"):
            numbers = self.columns[f"{part}_shard"]
            is_asked = numbers >= 0 if shards is None else (numbers >= 0) & shards[numbers]
            keys.append(np.ascontiguousarray(self.columns[part][is_asked]).view(f"V{KEY_BYTES}").reshape(-1))
        return len(np.unique(np.concatenate(keys)))

    def fingerprint(self) -> str:
        """A hash of all that is in the columns."""
        state = Digest()
        for name, column in sorted(self.columns.items()):
            state.add(name)
            for start in range(0, max(len(column), 1), _ROWS_AT_ONCE * 64):
                state.add(column[start : start + _ROWS_AT_ONCE * 64].tobytes())
        return state.hexdigest()

    def identify(self) -> str:
        """The identity of pictures and captions in their order (see examples.FeatureSet)."""
        state = Digest()
        state.add(self.null_key)
        columns, sizes = self.columns, [[side * LATENT_DOWNSCALE for side in size] for size in self.bins.sizes.tolist()]

        @functools.cache
        def tail(number: int, height: int, width: int, ratio: float, is_prior: int) -> str:
            return repr([sizes[number], [height, width], ratio, bool(is_prior)])[1:]

        for rows in _blocks(len(self)):
            keys = [_hex(columns[part][rows], columns[f"{part}_shard"][rows]) for part in PARTS]
            numbers = [columns["bin"][rows], *columns["size_px"][rows].T, *(columns[name][rows] for name in _MARKS)]
            tails = map(tail, *(column.tolist() for column in numbers))
            state.add_all(
                f"['{caption}', '{picture}', {hint!r}, {rest}"
                for caption, picture, hint, rest in zip(*keys, tails, strict=True)
            )
            if tail.cache_info().currsize > _ROWS_AT_ONCE:
                tail.cache_clear()
        for name in (name for name in VARYING if name in columns):
            state.add(name)
            state.add(columns[name].tobytes())
        return state.hexdigest()


def _hex(keys: np.ndarray, shards: np.ndarray) -> list[str | None]:
    joined, wide = keys.tobytes().hex(), 2 * KEY_BYTES
    found = (joined[start : start + wide] for start in range(0, len(joined), wide))
    return [key if shard >= 0 else None for key, shard in zip(found, shards.tolist(), strict=True)]


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS_AT_ONCE, count)) for start in range(0, count, _ROWS_AT_ONCE))


def _check(index: Index) -> None:
    columns = index.columns
    count = len(columns["bin"])
    if columns["bin"].dtype not in (np.uint16, np.uint32):
        raise ValueError("bins of another type")
    for name, (kind, shape) in (_ROWS | _OTHERS).items():
        column = columns[name]
        wrong_length = name in _ROWS and len(column) != count
        if column.dtype != kind or column.shape[1:] != shape or wrong_length:
            raise ValueError(f"a column {name} of another form")
    if not count or index.extent("bin")[1] >= len(columns["sizes"]):
        raise ValueError("no rows, or bins that there are not")
    for name, (kind, shape) in _FURTHER.items():
        if name in columns and (columns[name].dtype != kind or columns[name].shape != (count, *shape)):
            raise ValueError(f"a column {name} of another form")
    if (MASK in columns) != (f"{MASK}_shard" in columns):
        raise ValueError("masks without their files")
    if GROUP in columns and not np.isin(np.diff(columns[GROUP]), (0, 1)).all():
        raise ValueError("groups in another order")
    if len(columns["null_shard"]) != 1:
        raise ValueError("no empty caption")
    for part in (*PARTS, "null", *([MASK] if MASK in columns else [])):
        least = -1 if part in ("hint", MASK) else 0
        low, high = index.extent(f"{part}_shard")
        if low < least or high >= len(columns["shard_bytes"]):
            raise ValueError(f"shards of {part} that there are not")


def make_index(rows: Rows, null_key: str, shards: ShardFolder) -> Index:
    """The index of rows (see cache.DatasetEncoder). shards: has their entries.

    Raises KeyError for an entry that is not there.
    """
    parts = (*PARTS, MASK) if rows.has(MASK).any() else PARTS
    columns = rows.columns()
    found = {part: shards.find(rows.keys(part)) for part in parts}
    null = shards.find(np.frombuffer(bytes.fromhex(null_key), np.uint8).reshape(1, -1))
    for part in parts:
        found[part][~rows.has(part)] = -1
        if (found[part][rows.has(part)] < 0).any():
            raise KeyError(part)
    used = _by_first_use([*(shards.shards_of(found[part]) for part in parts), shards.shards_of(null)])
    new = np.full(len(shards.names) + 1, -1, np.int32)  # the last one is that of -1
    new[used] = np.arange(len(used))
    for part in parts:
        columns[part], columns[f"{part}_shard"] = rows.keys(part), new[shards.shards_of(found[part])]
    names = [shards.names[number] for number in used.tolist()]
    columns |= _bins_of(shards, found["picture"]) | {
        "null": np.frombuffer(bytes.fromhex(null_key), np.uint8).reshape(1, -1),
        "null_shard": new[shards.shards_of(null)],
        "shard_names": np.frombuffer("\n".join(names).encode(), np.uint8),
        "shard_bytes": np.array([(shards.folder / name).stat().st_size for name in names], np.int64),
    }
    return Index(columns)


def _by_first_use(numbers: Sequence[np.ndarray]) -> np.ndarray:
    """The numbers from 0 that there are, each once, in the order in which they come."""
    joined = np.concatenate(numbers)
    joined = joined[joined >= 0]
    firsts = np.unique(joined, return_index=True)[1]
    return joined[np.sort(firsts)]


def _bins_of(shards: ShardFolder, entries: np.ndarray) -> dict[str, np.ndarray]:
    """The columns that the shapes of pictures tell."""
    forms = shards.forms_of(entries)
    used = _by_first_use([forms])
    sizes = [tuple(shards.forms[number]["mean"][-2:]) for number in used.tolist()]
    bins = Bins.of(sizes)
    lookup = np.zeros(len(shards.forms), np.int64)
    lookup[used] = np.arange(len(used))
    ids = bins.ids[lookup[forms]].astype(id_type(len(bins.sizes)))
    has_deviation = np.array(["deviation" in shards.forms[number] for number in used.tolist()], np.uint8)
    return {"bin": ids, "sizes": bins.sizes, "has_deviation": has_deviation[lookup[forms]]}


def write_index(path: Path, columns: Mapping[str, np.ndarray | Iterable[np.ndarray]], shapes: Mapping = {}) -> None:
    """Write columns whole or not at all. One that comes in pieces has its (type, shape) in `shapes`."""
    forms = {name: shapes.get(name) or (column.dtype, column.shape) for name, column in columns.items()}
    header, offset = {}, 0
    ordered = sorted(forms, key=lambda name: -np.dtype(forms[name][0]).itemsize)  # so that each one is aligned
    for name in ordered:
        kind, shape = np.dtype(forms[name][0]), list(forms[name][1])
        end = offset + kind.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": _NAMES[kind], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in ordered:
                column = columns[name]
                for piece in [column] if isinstance(column, np.ndarray) else column:
                    file.write(np.ascontiguousarray(piece).data.cast("B") if piece.size else b"")

    write_atomically(path, write)


def open_index(path: Path) -> Index:
    """The index in a file. Raises FileNotFoundError, and ValueError for another content."""
    try:
        return Index(ColumnFile(path), path)
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"no list in columns ({error})") from error
