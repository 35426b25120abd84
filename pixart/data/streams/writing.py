"""Writes encoded pictures as a stream: tar files of pictures of one size, and the list of them."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.torch import save

from ...files.atomic import write_atomically
from ...quoting import shorten
from ..buckets import Bins
from ..examples import Example, FeatureSet, variants_of
from ..identity import digest
from ..storage.index import INDEX_SUFFIX, write_index
from .places import digest_of

VERSION = 1
VARIED_VERSION = 2  # of streams with what the first version would not see
STREAM = "stream.json"
STREAM_SHARD_BYTES = 32 * 2**20


def write_stream(
    features: FeatureSet, folder: str | Path, shard_bytes: int = STREAM_SHARD_BYTES, seed: int = 0, progress=None
) -> Path:
    """Write all pictures into a folder, shuffled, each tar file with pictures of one size. Returns the stream's list.

    Each picture is a `.json` (name, caption, sizes) and a `.safetensors` (mean, deviation, hint, mask, caption) of one
    name. Of a picture with variants the second and later ones have a number: mean.1, caption.1, and texts in the .json.
    progress: a cache.Progress. Raises ValueError for a folder that holds a stream already.
    """
    folder, identity = Path(folder), digest("stream", str(VERSION), features.identity, str(shard_bytes), str(seed))
    if (folder / STREAM).exists():
        raise ValueError(
            f"Stream exists already: got {shorten(str(folder), 300)}, expected a new folder. Choose another one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    bins = Bins.of(features.bins)
    order = np.random.default_rng(seed).permutation(len(features))
    order = order[np.argsort(bins.ids[order], kind="stable")]
    rows, shards = [], []
    for numbers in _shards_of(features, order, bins.ids, shard_bytes):
        path = folder / f"{identity[:8]}-{len(shards):06d}.tar"
        found: list[tuple[int, int, int]] = []
        write_atomically(path, lambda file, numbers=numbers, found=found: found.extend(_write(file, features, numbers)))
        rows += [(len(shards), *each) for each in found]
        shards.append((path.name, path.stat().st_size, digest_of(path)))
        if progress is not None:
            progress(len(rows), len(features), None)
    null = None if features.null_caption is None else save({"caption": features.null_caption.contiguous()}).hex()
    name = f"{identity[:16]}{INDEX_SUFFIX}"
    write_index(folder / name, _columns(features, bins, order, rows, shards))
    size, checksum = (folder / name).stat().st_size, digest_of(folder / name).hex()
    repeats = getattr(features, "repeats", ())
    varies = len(repeats) or any(is_varied(*variants_of(features, number)) for number in range(len(features)))
    head = {"version": VARIED_VERSION if varies else VERSION, "identity": identity, "null_caption": null}
    head |= {"index": name, "index_bytes": size, "index_digest": checksum, "pictures": len(rows), "shards": len(shards)}
    text = json.dumps(head, indent=1)
    write_atomically(folder / STREAM, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return folder / STREAM


def _shards_of(features: FeatureSet, order: np.ndarray, ids: np.ndarray, shard_bytes: int) -> Iterator[list[int]]:
    """Numbers of pictures of one size each, as many as fit; the room of the first stands for all of its size."""
    for run in np.split(order, np.flatnonzero(np.diff(ids[order])) + 1):
        each = sum(len(data) for data in _pack(features, int(run[0])))
        count = max(shard_bytes // each, 1)
        yield from (run[start : start + count].tolist() for start in range(0, len(run), count))


def _pack(features: FeatureSet, number: int) -> tuple[bytes, bytes]:
    """The content of a picture's two files."""
    captions, views = variants_of(features, number)
    example = views[0]
    told = {"name": features.name_of(number), "text": captions[0].text, "size_px": list(example.size_px)}
    told |= {"aspect_ratio": example.aspect_ratio, "is_prior": example.is_prior}
    if is_varied(captions, views):
        told |= {"texts": [each.text for each in captions], "views": len(views), "weight": example.weight}
    tensors = {}
    for place, view in enumerate(views):
        parts = {"mean": view.latent, "deviation": view.deviation, "hint": view.hint, "mask": view.mask}
        tensors |= {part_of(part, place): tensor for part, tensor in parts.items() if tensor is not None}
    tensors |= {part_of("caption", place): each.caption for place, each in enumerate(captions)}
    return json.dumps(told).encode(), save({name: tensor.contiguous() for name, tensor in tensors.items()})


def part_of(part: str, place: int) -> str:
    """The name of a part of a variant."""
    return f"{part}.{place}" if place else part


def is_varied(captions: list[Example], views: list[Example]) -> bool:
    """Whether a picture has what the first version would not see."""
    return len(captions) + len(views) > 2 or views[0].mask is not None or views[0].weight != 1


def _write(path: Path, features: FeatureSet, numbers: list[int]) -> Iterator[tuple[int, int, int]]:
    """(where the .json begins, its bytes, those of the .safetensors) of each picture."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in numbers:
            content = _pack(features, number)
            offset = archive.offset + tarfile.BLOCKSIZE
            for suffix, data in zip(("json", "safetensors"), content, strict=True):
                member = tarfile.TarInfo(f"{number:010d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            yield offset, *map(len, content)


def _columns(features: FeatureSet, bins: Bins, order: np.ndarray, rows: list, shards: list) -> dict[str, np.ndarray]:
    numbers = np.array(rows, np.int64).reshape(-1, 4)
    repeats = getattr(features, "repeats", ())
    return {
        **({"repeats": np.asarray(repeats, np.float64)[order]} if len(repeats) else {}),
        "shard": numbers[:, 0].astype(np.int32),
        "offset": numbers[:, 1],
        "text_bytes": numbers[:, 2].astype(np.int32),
        "tensor_bytes": numbers[:, 3].astype(np.int32),
        "bin": bins.ids[order],
        "sizes": bins.sizes.astype(np.int32),
        "is_prior": np.array(features.is_prior, np.uint8)[order],
        "shard_bytes": np.array([size for _, size, _ in shards], np.int64),
        "shard_digests": np.frombuffer(b"".join(each for _, _, each in shards), np.uint8).reshape(len(shards), -1),
        "shard_names": np.frombuffer("\n".join(name for name, _, _ in shards).encode(), np.uint8),
    }
