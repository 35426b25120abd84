"""Reads a stream while training: pictures by number, from tar files that are fetched when their turn comes."""

import hashlib
import json
import os
from pathlib import Path
from random import Random
from tarfile import BLOCKSIZE

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from ...files.documents import parse_json
from ...files.inside import is_plain_name
from ...files.regular import MEGABYTE, read_bytes
from ...quoting import shorten
from ..buckets import Bins
from ..examples import Example
from .places import Ahead, Cache, Folder, digest_of, fetch_small, is_address
from .writing import STREAM, VARIED_VERSION, VERSION, part_of

CACHE, CACHE_GB = "PIXART_STREAM_CACHE", "PIXART_STREAM_CACHE_GB"  # of the environment: the folder, and its bound
_USUAL_GB = 4.0
SHARDS_A_BLOCK = 8  # whose pictures are shuffled with each other
_HEAD_BYTES = 64 * MEGABYTE
_COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "text_bytes": np.int32,
    "tensor_bytes": np.int32,
    "is_prior": np.uint8,
    "sizes": np.int32,
    "shard_bytes": np.int64,
    "shard_digests": np.uint8,
    "shard_names": np.uint8,
}
_MORE = ("repeats",)


class StreamFeatures:
    """A FeatureSet over a stream. It can be copied into other processes.

    blocks: (N,) the block of each picture, a few tar files of one size: a BucketSampler shuffles within blocks, and
    takes some of them at a time, so that few files are needed at once. fetch_ahead: of blocks whose turn comes next.
    """

    def __init__(self, place: Folder | Cache, head: dict, columns: dict[str, np.ndarray]):
        self.place, self._columns, self.identity = place, columns, str(head["identity"])
        self.bins, self.is_prior = Bins(columns["sizes"], columns["bin"]), columns["is_prior"].view(bool)
        self.repeats = columns.get("repeats", ())
        null = head["null_caption"]
        self.null_caption = None if null is None else load(bytes.fromhex(null))["caption"]
        names = columns["shard_names"].tobytes().decode().split("\n")
        digests = [row.tobytes() for row in columns["shard_digests"]]
        self._shards = list(zip(names, columns["shard_bytes"].tolist(), digests, strict=True))
        if not all(map(is_plain_name, names)) or not _fit(columns):
            raise ValueError("columns that do not fit")
        self._blocks_of_shards = _blocks(columns)
        self.blocks = self._blocks_of_shards[columns["shard"]]

    def fetch_ahead(self, blocks: list[int]) -> None:
        """Begin to fetch the files of some blocks."""
        if isinstance(self.place, Cache):
            wanted = np.flatnonzero(np.isin(self._blocks_of_shards, blocks)).tolist()
            Ahead(self.place, [self._shards[number] for number in wanted]).start()

    def name_of(self, index: int) -> str:
        return str(self._read(index)[0]["name"])

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> Example:
        """A picture in its first variant."""
        return _example(*self._read(index), 0, 0)

    def variants_of(self, index: int) -> tuple[list[Example], list[Example]]:
        """See examples.variants_of."""
        told, tensors = self._read(index)
        captions, views = _counts(told)
        return (
            [_example(told, tensors, number, 0) for number in range(captions)],
            [_example(told, tensors, 0, number) for number in range(views)],
        )

    def draw(self, index: int, rng: Random) -> Example:
        """A picture in one of its views, with one of its captions."""
        told, tensors = self._read(index)
        return _example(told, tensors, *map(rng.randrange, _counts(told)))

    def _read(self, index: int) -> tuple[dict, dict[str, torch.Tensor]]:
        columns, shard = self._columns, self._shards[self._columns["shard"][index]]
        offset, text, tensors = (int(columns[name][index]) for name in ("offset", "text_bytes", "tensor_bytes"))
        while True:
            try:
                with self.place.file(*shard).open("rb") as file:
                    file.seek(offset)
                    told = json.loads(file.read(text))
                    file.seek(-text % BLOCKSIZE + BLOCKSIZE, os.SEEK_CUR)
                    return told, load(file.read(tensors))
            except FileNotFoundError:  # another process has made room of it since
                continue
            except (ValueError, SafetensorError) as error:
                raise OSError(
                    f"Shard cannot be read: got {shorten(error, 200)} in {shard[0]}, expected it as it was written. "
                    f"Write the stream again."
                ) from error


def _counts(told: dict) -> tuple[int, int]:
    """(captions, views) of a picture."""
    return len(told.get("texts", (None,))), told.get("views", 1)


def _example(told: dict, tensors: dict[str, torch.Tensor], caption: int, view: int) -> Example:
    found = {part: tensors.get(part_of(part, view)) for part in ("mean", "deviation", "hint", "mask")}
    return Example(
        latent=found["mean"],
        deviation=found["deviation"],
        caption=tensors[part_of("caption", caption)],
        size_px=tuple(told["size_px"]),
        aspect_ratio=told["aspect_ratio"],
        hint=found["hint"],
        is_prior=bool(told["is_prior"]),
        text=told["texts"][caption] if "texts" in told else told["text"],
        mask=found["mask"],
        weight=told.get("weight", 1.0),
    )


def _fit(columns: dict[str, np.ndarray]) -> bool:
    count = len(columns["bin"])
    by_row = ("shard", "offset", "text_bytes", "tensor_bytes", "is_prior")
    return (
        count > 0
        and all(len(columns[name]) == count for name in by_row)
        and all(columns[name].dtype == kind for name, kind in _COLUMNS.items())
        and all(columns[name].dtype == np.float64 and len(columns[name]) == count for name in _MORE if name in columns)
        and 0 <= int(columns["shard"].min())
        and int(columns["shard"].max()) < len(columns["shard_bytes"])
        and int(columns["bin"].max()) < len(columns["sizes"])
    )


def _blocks(columns: dict[str, np.ndarray]) -> np.ndarray:
    """(S,) the block of each shard: so many behind each other of one bin."""
    firsts = np.unique(columns["shard"], return_index=True)[1]
    bins = columns["bin"][firsts]
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    blocks, number = np.zeros(len(bins), np.int32), 0
    for start, end in zip(starts, [*starts[1:], len(bins)], strict=True):
        within = np.arange(end - start) // SHARDS_A_BLOCK
        blocks[start:end] = number + within
        number += int(within[-1]) + 1
    return blocks


def is_stream(where: str | os.PathLike) -> bool:
    """Whether there is a stream at a path; an address is always one."""
    return is_address(where) or (Path(where) / STREAM).is_file()


def open_stream(where: str | os.PathLike, cache: Path | None = None, cache_bytes: int | None = None) -> StreamFeatures:
    """The stream in a folder or at an address: http, https, or one that fsspec knows.

    cache: folder for what is fetched from an address; None is that of the environment, or one below the user's own.
    cache_bytes: how much it keeps; None is the environment's number, or 4 GB.
    Raises OSError when nothing answers, ValueError for another content.
    """
    try:
        if not is_address(where):
            head = parse_json(read_bytes(Path(where) / STREAM, _HEAD_BYTES))
            return _open(Folder(Path(where)), head)
        head = parse_json(fetch_small(os.fspath(where), STREAM, _HEAD_BYTES))
        own = hashlib.blake2b(os.fspath(where).encode(), digest_size=8).hexdigest()
        usual = os.environ.get(CACHE) or Path.home() / ".cache" / "pixart-pack" / "streams"
        limit = _usual_bytes() if cache_bytes is None else cache_bytes
        return _open(Cache(os.fspath(where), Path(cache or usual) / own, limit), head)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"Not a stream: got {shorten(error, 200)} at {shorten(os.fspath(where), 300)}, expected {STREAM} of "
            f"version {VERSION} and what it names. Write it with: python -m pixart encode --stream"
        ) from error


def _usual_bytes() -> int:
    written = os.environ.get(CACHE_GB) or _USUAL_GB
    try:
        return int(float(written) * 1e9)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{shorten(written)} GB in {CACHE_GB}, expected a number") from error


def _open(place: Folder | Cache, head: dict) -> StreamFeatures:
    if head["version"] not in (VERSION, VARIED_VERSION) or not is_plain_name(head["index"]):
        raise ValueError("another version")
    path = place.file(head["index"], head["index_bytes"], bytes.fromhex(head["index_digest"]))
    if digest_of(path).hex() != head["index_digest"]:
        raise ValueError("a damaged list")
    with safe_open(path, framework="pt") as file:
        more = [name for name in _MORE if name in file.keys()]  # noqa: SIM118
        columns = {name: file.get_tensor(name).numpy() for name in ("bin", *_COLUMNS, *more)}
    return StreamFeatures(place, head, columns)
