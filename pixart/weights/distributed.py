"""Reads folders by torch.distributed.checkpoint (FSDP, several GPUs) without running anything that they hold.

`.metadata` is a pickle that names the tensors and where the parts of each lie; every part is a file by torch.save
inside a `.distcp` file. Both are read by the bounded reader of `pickles.py`.
"""

import io
import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from ..files.inside import check_inside, is_plain_name
from ..files.regular import read_bytes
from ..quoting import shorten
from .opcodes import Record
from .pickles import PickledFile, StoredTensor, open_pickled, read_records

METADATA = ".metadata"
_METADATA_BYTES = 2**26
_MOST_PARTS = 1024  # of one tensor: as many processes
# Module -> the classes of its records that say something.
RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex"),
        "BytesStorageMetadata",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}


class _Part(NamedTuple):
    """A box of a tensor, and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    position: int
    length: int


class _PartedTensor(NamedTuple):
    """A tensor of such a folder before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[_Part, ...]


@dataclass(frozen=True)
class DistributedFolder:
    """A folder whose tensors are described, not read. content: dotted name -> description."""

    path: Path
    content: dict[str, _PartedTensor]
    metadata: dict[str, str]

    def read(self, wanted: Mapping[str, _PartedTensor], own: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """The wanted tensors, each put together in memory of its own."""
        return {name: _put_together(self.path, name, parted) for name, parted in wanted.items()}


def is_distributed(folder: Path) -> bool:
    """Whether a folder was written by torch.distributed.checkpoint."""
    return (folder / METADATA).is_file()


def open_distributed(folder: Path) -> DistributedFolder:
    """Describe a folder. Raises ValueError naming it when its metadata is damaged, foreign, or leads out of it."""
    place = check_inside(folder / METADATA, folder)
    try:
        top = _state(read_records(io.BytesIO(read_bytes(place, _METADATA_BYTES)), RECORDS), "Metadata")
        stored = {}
        for index, info in top["storage_data"].items():
            found = _state(index, "MetadataIndex")
            stored[found["fqn"], _box(found.get("offset"))] = _state(info, "_StorageInfo")
        tensors = {
            name: _describe(folder, name, _state(each, "TensorStorageMetadata"), stored)
            for name, each in top["state_dict_metadata"].items()
            if isinstance(each, Record) and each.kind == "TensorStorageMetadata" and isinstance(name, str)
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Unreadable distributed checkpoint: got {shorten(folder.name)} whose {METADATA} is not as PyTorch writes "
            f"it, expected one by torch.distributed.checkpoint. Convert it with torch.distributed.checkpoint."
            f"format_utils.dcp_to_torch_save where it was trained."
        ) from error
    return DistributedFolder(folder, tensors, {})


def _state(record: object, kind: str) -> dict:
    if not isinstance(record, Record) or record.kind != kind or not isinstance(record.state, dict):
        raise TypeError(f"no {kind}")
    return record.state


def _box(counts: object) -> tuple[int, ...]:
    if counts is None:
        return ()
    if type(counts) is not tuple or not all(type(count) is int and 0 <= count < 2**40 for count in counts):
        raise TypeError("no size")
    return counts


def _describe(folder: Path, name: str, fields: dict, stored: Mapping) -> _PartedTensor:
    dtype = fields["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("no dtype")
    shape, parts = _box(fields["size"]), []
    for chunk in fields["chunks"]:
        chunk = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _box(chunk["offsets"]), _box(chunk["sizes"])
        info = stored[name, offsets]
        if info.get("transform_descriptors"):
            raise TypeError("packed parts")
        if not is_plain_name(info["relative_path"]):
            raise TypeError("a name that leads out")
        file = check_inside(folder / info["relative_path"], folder)
        parts.append(_Part(offsets, sizes, file, *_box((info["offset"], info["length"]))))
    return _PartedTensor(shape, dtype, tuple(parts))


def _put_together(folder: Path, name: str, parted: _PartedTensor) -> torch.Tensor:
    """A tensor of its parts. Raises ValueError where they do not fill it, each place once."""
    if not _fills(parted):
        raise ValueError(
            f"Parts do not fill a tensor: got {len(parted.parts)} of {shorten(name)} in {shorten(folder.name)}, "
            f"expected {shorten(parted.shape)} whole. Save the checkpoint again."
        )
    parts = [(part, _read(folder, name, part, parted.dtype)) for part in parted.parts]
    if len(parts) == 1:
        return parts[0][1]
    whole = torch.empty(parted.shape, dtype=parted.dtype)
    for part, tensor in parts:
        whole[tuple(slice(start, start + size) for start, size in zip(part.offsets, part.sizes, strict=True))] = tensor
    return whole


def _fills(parted: _PartedTensor) -> bool:
    """Whether the parts are boxes inside the tensor that do not overlap, and together as large as it is."""
    boxes = [[(start, start + size) for start, size in zip(*each[:2], strict=False)] for each in parted.parts]
    rank = len(parted.shape)
    if not 0 < len(boxes) <= _MOST_PARTS or any(len(each.offsets) != rank for each in parted.parts):
        return False
    inside = all(end <= side for box in boxes for (_, end), side in zip(box, parted.shape, strict=True))
    apart = all(
        any(one[1] <= other[0] or other[1] <= one[0] for one, other in zip(left, right, strict=True))
        for left, right in itertools.combinations(boxes, 2)
    )
    return inside and apart and sum(math.prod(each.sizes) for each in parted.parts) == math.prod(parted.shape)


def _read(folder: Path, name: str, part: _Part, dtype: torch.dtype) -> torch.Tensor:
    """One part. Raises ValueError when it is not there whole, or is of another size or type than the metadata says."""
    size = part.file.stat().st_size if part.file.is_file() else 0
    needed = math.prod(part.sizes) * dtype.itemsize
    opened = None
    if part.position + part.length <= size and needed <= part.length:
        with part.file.open("rb") as file:
            file.seek(part.position)
            data = bytearray(part.length)
            file.readinto(data)
        opened = open_pickled(_InMemory(part.file.name, data))
    stored = opened.content if isinstance(opened, PickledFile) else None
    if not isinstance(stored, StoredTensor) or stored.shape != part.sizes or stored.dtype != dtype:
        raise ValueError(
            f"Damaged part of a distributed checkpoint: got no {shorten(part.sizes)} of {dtype} for {shorten(name)} in "
            f"{shorten(part.file.name)}, expected it there. Copy the folder {shorten(folder.name)} again."
        )
    if 0 in stored.shape:
        return torch.empty(stored.shape, dtype=dtype)
    place = opened.places[stored.storage] + stored.offset * dtype.itemsize
    span = sum((length - 1) * step for length, step in zip(stored.shape, stored.stride, strict=True)) + 1
    flat = torch.frombuffer(data, dtype=torch.uint8, count=span * dtype.itemsize, offset=place)
    return flat.clone().view(dtype).as_strided(stored.shape, stored.stride).contiguous()


class _InMemory:
    """Bytes in the place of a file's path."""

    def __init__(self, name: str, data: bytearray):
        self.name, self._data = name, data

    def open(self, *_, **__) -> io.BytesIO:
        return io.BytesIO(self._data)

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=len(self._data))
