"""Reads PyTorch's own files (.pth, .pt, .bin, .ckpt) without running anything that they hold.

A pickle names the functions to call. Here only containers and the few functions that describe a tensor are known;
every other name, whatever it is, gives an inert `Foreign` object, so files that carry an argparse.Namespace or a
scheduler load, and a hostile file does nothing. Tensors are first only described, then read from the file at the
place of their bytes, memory-mapped where that is possible.
"""

import io
import logging
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..quoting import shorten
from .opcodes import Foreign, Function, Record, pairs_of, run

log = logging.getLogger(__name__)

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file by torch.save before version 1.6
_MOST_NAMES = 64  # of unknown objects that are kept for the log
_MOST_DIMENSIONS = 64  # of a tensor, as in PyTorch
_MOST_ELEMENTS = 2**62
_MOST_REPEATED_BYTES = 2**20  # of a tensor that was saved expanded: one row for many
_MOST_SHARES = 4  # names of the same bytes, as T5's tied embeddings have
_MOST_DIRECTORY_BYTES = 2**23  # of an archive's list of entries, about a hundred thousand
_MOST_PICKLE_BYTES = 2**28
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# What a malformed or hostile pickle can make the unpickler raise.
_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


class StoredTensor(NamedTuple):
    """A tensor that lies in a file: `storage` is the key of its bytes, offset and stride count elements."""

    storage: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class PickledFile:
    """A file by torch.save whose tensors are described, not read.

    content: everything in it; tensors as StoredTensor, foreign objects as Foreign. places: storage -> its position.
    """

    path: Path
    content: object
    places: dict[str, int]

    @property
    def metadata(self) -> dict[str, str]:
        """The texts that `save_checkpoint` puts next to the state dict."""
        texts = self.content.get("metadata") if isinstance(self.content, Mapping) else None
        items = texts.items() if isinstance(texts, Mapping) else ()
        return {key: value for key, value in items if isinstance(key, str) and isinstance(value, str)}

    def read(self, wanted: Mapping[str, StoredTensor], own: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """The wanted tensors: those named by own in memory of their own, the others mapped from the file."""
        return _read_tensors(self.path, wanted, self.places, own)


def open_pickled(path: Path) -> PickledFile:
    """Describe a file by torch.save, zip or older format. Raises ValueError when it is damaged or no such file."""
    return PickledFile(path, *_open(path))


def read_records(file: io.BufferedIOBase, kinds: Mapping[str, Collection[str]]) -> object:
    """What a bare pickle describes, with the objects of the classes `kinds` (module -> names) as Records.

    Raises ValueError when it is damaged or beyond a bound.
    """
    names = _Names()

    def find(module: str, name: str) -> object:
        is_kind = name in kinds.get(module, ())
        return Function(lambda *_: Record(name)) if is_kind else names.find(module, name)

    try:
        return run(file, find, names.storage)
    except _PICKLE_ERRORS as error:
        raise ValueError(
            f"Unreadable pickle: got a damaged or hostile one ({shorten(error)}), expected a checkpoint's. Download "
            f"the files again from a source that you trust."
        ) from error


def check_pth(path: Path) -> None:
    """What has to be asked before torch.load, which bounds nothing even where it reads weights only.

    Raises ValueError for a file that is damaged, beyond a bound, or holds anything but tensors and plain containers:
    no sets and byte strings either, which torch.save writes as calls.
    """
    _open(path, foreign=False)


def _open(path: Path, foreign: bool = True) -> tuple[object, dict[str, int]]:
    """(everything in the file, storage key -> position of its bytes)."""
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    return (_open_zip if is_zip else _open_legacy)(path, foreign)


class _Names:
    """What the names and the persistent ids in a pickle stand for; all but descriptions of tensors are Foreign."""

    def __init__(self):
        self.storages: dict[str, _Storage] = {}
        self.foreign: set[str] = set()

    def find(self, module: str, name: str) -> object:
        known = _ALLOWED.get((module, name))
        if known is None and module in ("torch", "torch.cuda", "torch.storage"):
            known = _STORAGE_DTYPES.get(name) or _DTYPES.get(name)
        if known is not None:
            return known
        if len(self.foreign) < _MOST_NAMES:
            self.foreign.add(f"{module}.{name}")
        return Foreign

    def storage(self, pid: object) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a storage was expected")
        _, dtype, key, _, count, *view = pid
        sound = isinstance(dtype, torch.dtype) and isinstance(key, str) and _is_count(count)
        if not sound or view not in ([], [None]):
            raise pickle.UnpicklingError("a malformed storage")
        return self.storages.setdefault(key, _Storage(key, dtype, count))


def _rebuild(storage, offset, shape, stride, *_):
    return _describe(storage, offset, shape, stride, storage.dtype)


def _rebuild_with_dtype(storage, offset, shape, stride, requires_grad, hooks, dtype, *_):
    return _describe(storage, offset, shape, stride, dtype)


def _describe(storage, offset, shape, stride, dtype):
    shape, stride = _size(shape), _size(stride)
    sound = isinstance(storage, _Storage) and isinstance(dtype, torch.dtype) and _is_count(offset)
    if not sound or len(shape) != len(stride) or math.prod(size or 1 for size in shape) >= _MOST_ELEMENTS:
        raise pickle.UnpicklingError("a malformed tensor")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.count * storage.dtype.itemsize:
        raise pickle.UnpicklingError("a tensor larger than its storage")
    return StoredTensor(storage.key, offset, shape, stride, dtype)


def _size(counts=()):
    if type(counts) not in (tuple, list) or len(counts) > _MOST_DIMENSIONS or not all(map(_is_count, counts)):
        raise pickle.UnpicklingError("a malformed size")
    return tuple(counts)


def _rebuild_parameter(tensor, *_):
    return tensor


def _rebuild_subclass(function, kind, arguments, *_):
    if function is Foreign:
        return Foreign()
    if function not in _TENSOR_FUNCTIONS or type(arguments) is not tuple:
        raise pickle.UnpicklingError("a malformed tensor")
    return function.call(*arguments)


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**62


_PLAIN, _TYPED, _PARAMETER = map(Function, (_rebuild, _rebuild_with_dtype, _rebuild_parameter))
_TENSOR_FUNCTIONS = (_PLAIN, _TYPED, _PARAMETER)
_ALLOWED = {
    ("collections", "OrderedDict"): Function(pairs_of),
    ("torch", "Size"): Function(_size),
    ("torch._utils", "_rebuild_tensor"): _PLAIN,
    ("torch._utils", "_rebuild_tensor_v2"): _PLAIN,
    ("torch._utils", "_rebuild_tensor_v3"): _TYPED,
    ("torch._utils", "_rebuild_parameter"): _PARAMETER,
    ("torch._utils", "_rebuild_parameter_with_state"): _PARAMETER,
    ("torch._tensor", "_rebuild_from_type_v2"): Function(_rebuild_subclass),
}


def _load_pickle(file: io.BufferedIOBase, path: Path, foreign: bool = True) -> tuple[object, dict[str, _Storage]]:
    names = _Names()
    try:
        content = run(file, names.find, names.storage)
    except _PICKLE_ERRORS as error:
        raise ValueError(
            f"Unreadable PyTorch file {shorten(path.name)}: got a damaged or hostile pickle ({shorten(error)}), "
            f"expected a checkpoint. Download the file again from a source that you trust."
        ) from error
    if names.foreign:
        listed = ", ".join(shorten(name)[1:-1] for name in sorted(names.foreign)[:8])
        if not foreign:
            raise ValueError(
                f"Foreign objects in {shorten(path.name)}: got {listed}, expected tensors and plain values alone. "
                f"Choose another file, from a source that you trust."
            )
        log.info("%s: skipped objects that are no weights (%s); nothing of them was run.", path.name, listed)
    return content, names.storages


def _open_zip(path: Path, foreign: bool) -> tuple[object, dict[str, int]]:
    """As _open for torch.save's archives."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(_Directory(file)) as archive:
            entries = _entries(path, archive)
            folder = _checkpoint_folder(path, entries)
            order = entries.get(f"{folder}byteorder")
            _require_little_endian(path, order is None or _read_entry(path, file, order) == b"little")
            content, storages = _load_pickle(
                io.BytesIO(_read_entry(path, file, entries[f"{folder}data.pkl"])), path, foreign
            )
            places = {}
            for storage in storages.values():
                entry = entries.get(f"{folder}data/{storage.key}")
                if entry is None or entry.file_size < storage.count * storage.dtype.itemsize:
                    raise _truncated(path)
                places[storage.key] = _position(file, entry)
            return content, places
    except (zipfile.BadZipFile, NotImplementedError, EOFError, UnicodeDecodeError, struct.error) as error:
        raise _truncated(path) from error


class _Directory:
    """An archive's file for zipfile, which takes the length of the list of entries on trust."""

    def __init__(self, file: io.BufferedReader):
        self.seek, self.tell, self.seekable, self._read = file.seek, file.tell, file.seekable, file.read

    def read(self, count: int = -1) -> bytes:
        data = self._read(min(count, _MOST_DIRECTORY_BYTES + 1) if count >= 0 else _MOST_DIRECTORY_BYTES + 1)
        if len(data) > _MOST_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("a list of entries without measure")
        return data


def _entries(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries by name. Raises ValueError where two have one name, or all claim more than the archive holds."""
    listed = archive.infolist()
    entries = {entry.filename: entry for entry in listed}
    if len(entries) < len(listed):
        raise ValueError(
            f"Ambiguous archive: got two entries of one name in {shorten(path.name)}, expected names of their own. "
            f"Download the file again from a source that you trust."
        )
    size = path.stat().st_size
    if any(entry.header_offset < 0 for entry in listed) or sum(entry.compress_size for entry in listed) > size:
        raise _truncated(path)
    return entries


def _read_entry(path: Path, file: io.BufferedReader, entry: zipfile.ZipInfo) -> bytes:
    """The bytes of a stored entry. Raises BadZipFile when they are not what was written."""
    if entry.file_size > _MOST_PICKLE_BYTES:
        raise ValueError(
            f"Oversized pickle: got {math.ceil(entry.file_size / 1e6)} MB in {shorten(path.name)} beside its tensors, "
            f"expected at most {math.ceil(_MOST_PICKLE_BYTES / 1e6)} MB. Save the weights alone."
        )
    file.seek(_position(file, entry))
    data = file.read(entry.file_size)
    if zlib.crc32(data) != entry.CRC:
        raise zipfile.BadZipFile("a wrong checksum")
    return data


def _checkpoint_folder(path: Path, entries: Mapping[str, zipfile.ZipInfo]) -> str:
    """The folder in the archive that holds data.pkl, "" or with its slash. Raises ValueError for another archive."""
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1 or any(name.endswith("constants.pkl") for name in entries):
        kind = "a TorchScript program" if pickles else "a zip archive of other files"
        raise ValueError(
            f"Not a checkpoint: got {kind} in {shorten(path.name)}, expected a file by torch.save. Unpack the archive, "
            f"or choose the checkpoint itself."
        )
    if any(_is_packed(entry) for entry in entries.values()):
        raise ValueError(
            f"Packed checkpoint: got compressed or locked entries in {shorten(path.name)}, expected them stored as "
            f"torch.save does. Unpack the archive, or download the checkpoint again."
        )
    return pickles[0].removesuffix("data.pkl")


def _is_packed(entry: zipfile.ZipInfo) -> bool:
    stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
    return not stored or bool(entry.flag_bits & 1)


def _position(file, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header, whose name and extra field have their own lengths."""
    file.seek(entry.header_offset)
    if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
        raise zipfile.BadZipFile("no entry where one should be")
    file.seek(entry.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    return entry.header_offset + 30 + name_length + extra_length


def _open_legacy(path: Path, foreign: bool) -> tuple[object, dict[str, int]]:
    """As _open for the format before torch 1.6: four pickles, the storage keys, then length and bytes of each."""
    with path.open("rb") as file:
        magic = _load_pickle(file, path)[0]
        if magic != LEGACY_MAGIC:
            raise ValueError(
                f"Not a checkpoint: got a pickle of something else in {shorten(path.name)}, expected a file by "
                f"torch.save. Choose the checkpoint itself."
            )
        _load_pickle(file, path)  # the version of the format, the same ever since
        system = _load_pickle(file, path)[0]
        _require_little_endian(path, not isinstance(system, Mapping) or system.get("little_endian", True) is True)
        content, storages = _load_pickle(file, path, foreign)
        keys = _load_pickle(file, path)[0]
        size = path.stat().st_size
        places = {}
        for key in keys if isinstance(keys, list) else ():
            length = file.read(8)
            storage = storages.get(key) if isinstance(key, str) else None
            if len(length) < 8 or storage is None or struct.unpack("<q", length)[0] != storage.count:
                raise _truncated(path)
            places[key] = file.tell()
            file.seek(storage.count * storage.dtype.itemsize, 1)
            if file.tell() > size:
                raise _truncated(path)
        if set(places) != set(storages):
            raise _truncated(path)
        return content, places


def _require_held(path: Path, wanted: Mapping[str, StoredTensor], file_bytes: int) -> None:
    """Raises ValueError for tensors that claim far more than the file holds: what is read is copied at full size."""
    total = 0
    for name, stored in wanted.items():
        claimed = math.prod(stored.shape) * stored.dtype.itemsize
        total += claimed
        span = sum((length - 1) * step for length, step in zip(stored.shape, stored.stride, strict=True)) + 1
        if claimed > max(span * stored.dtype.itemsize, _MOST_REPEATED_BYTES):
            raise ValueError(
                f"Repeated tensor {shorten(name)}: got {shorten(stored.shape)} of {span} stored numbers in "
                f"{shorten(path.name)}, expected all of its numbers there. Save it again with .contiguous()."
            )
    if total > _MOST_SHARES * file_bytes + _MOST_REPEATED_BYTES:
        raise ValueError(
            f"Tensors share their bytes too often: got {math.ceil(total / 1e6)} MB in all out of {shorten(path.name)} "
            f"of {math.ceil(file_bytes / 1e6)} MB, expected at most {_MOST_SHARES} times as many. Save them again with "
            f".clone()."
        )


def _read_tensors(path: Path, wanted: Mapping, places: dict, own: Collection[str]) -> dict[str, torch.Tensor]:
    size = path.stat().st_size
    _require_held(path, wanted, size)
    mapping = torch.UntypedStorage.from_file(str(path), False, size) if wanted else None
    read, tensors = {}, {}
    with path.open("rb", buffering=0) as file:
        for name, stored in wanted.items():
            span = sum((length - 1) * step for length, step in zip(stored.shape, stored.stride, strict=True)) + 1
            place = places[stored.storage] + stored.offset * stored.dtype.itemsize
            count = span * stored.dtype.itemsize if 0 not in stored.shape else 0
            if place + count > size:
                raise _truncated(path)
            if name not in own and count and place % stored.dtype.itemsize == 0:
                storage = mapping[place : place + count]
            else:
                if (place, count) not in read:
                    read[place, count] = _read_bytes(file, path, place, count)
                storage = read[place, count].untyped_storage()
            tensors[name] = torch.empty(0, dtype=stored.dtype).set_(storage, 0, stored.shape, stored.stride)
    return tensors


def _read_bytes(file, path: Path, place: int, count: int) -> torch.Tensor:
    data = torch.empty(count, dtype=torch.uint8)
    view = memoryview(data.numpy())
    file.seek(place)
    while view:
        done = file.readinto(view)
        if not done:
            raise _truncated(path)
        view = view[done:]
    return data


def _require_little_endian(path: Path, little: bool) -> None:
    if not little:
        raise ValueError(
            f"Byte order mismatch: got a big-endian file {shorten(path.name)}, expected little-endian. Save the "
            f"checkpoint again on an ordinary machine."
        )


def _truncated(path: Path) -> ValueError:
    return ValueError(
        f"Truncated or damaged file: got only a part of '{path.name}' ({math.ceil(path.stat().st_size / 1e6)} MB), "
        f"expected a complete checkpoint. Download the file again."
    )
