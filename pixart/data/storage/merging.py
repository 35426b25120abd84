"""One list out of those of several shares, in the order that one process would have written."""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from ..buckets import id_type
from .index import Index
from .rows import FURTHER, GROUP, KEY_BYTES, MASK, PARTS, RECORD, TEXTS

_PLAIN = ("size_px", "aspect_ratio", "is_prior", "has_deviation", *PARTS)


def merge_indexes(parts: Sequence[Index]) -> Index:
    """The rows of all parts by the numbers of their records; a picture that an earlier one repeats is left out."""
    names = list(dict.fromkeys(name for part in parts for name in part.shards))
    sizes = np.unique(np.concatenate([part.columns["sizes"] for part in parts]), axis=0)
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in (*_PLAIN, RECORD)}
    numbers = {name: number for number, name in enumerate(names)}
    new = [np.array([*(numbers[name] for name in part.shards), -1], np.int32) for part in parts]  # -1 stays -1
    for part in PARTS:
        shards = [each[index.columns[f"{part}_shard"]] for each, index in zip(new, parts, strict=True)]
        columns[f"{part}_shard"] = np.concatenate(shards)
    columns |= _further(parts, new)
    found = {tuple(size): number for number, size in enumerate(sizes.tolist())}
    bins = (np.array([found[tuple(size)] for size in index.columns["sizes"].tolist()]) for index in parts)
    columns["bin"] = np.concatenate([own[index.columns["bin"]] for own, index in zip(bins, parts, strict=True)])
    order = _without_twins(columns, np.argsort(columns[RECORD], kind="stable"))
    columns = {name: column[order] for name, column in columns.items()}
    columns["bin"] = columns["bin"].astype(id_type(len(sizes)))
    if GROUP in columns:
        columns[GROUP] = np.cumsum(np.diff(columns[GROUP], prepend=columns[GROUP][:1]) != 0).astype(np.int32)
    files = (zip(index.shards, index.columns["shard_bytes"].tolist(), strict=True) for index in parts)
    bytes_of = dict(chain.from_iterable(files))
    columns |= {
        "sizes": sizes.astype(np.int32),
        "null": parts[0].columns["null"],
        "null_shard": new[0][parts[0].columns["null_shard"]],
        "shard_names": np.frombuffer("\n".join(names).encode(), np.uint8),
        "shard_bytes": np.array([bytes_of[name] for name in names], np.int64),
    }
    columns.pop(RECORD)
    for which in TEXTS:
        texts = list(_texts(parts, which, order))
        columns[f"{which}_end"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
        columns[f"{which}_bytes"] = np.frombuffer(b"".join(texts), np.uint8)
    return Index(columns)


def _further(parts: Sequence[Index], new: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The columns that only some lists have; where a part has none, what stands for it."""
    found, first = {}, 0
    if any(GROUP in part.columns for part in parts):
        groups = []
        for part in parts:
            own = part.columns.get(GROUP)
            own = np.arange(len(part), dtype=np.int32) if own is None else own
            groups.append(own + (first - own[0]))
            first = int(groups[-1][-1]) + 1
        found[GROUP] = np.concatenate(groups)
    for name in ("repeats", "weight"):
        if any(name in part.columns for part in parts):
            usual = FURTHER[name][1]
            found[name] = np.concatenate([part.columns.get(name, np.full(len(part), usual)) for part in parts])
    if any(MASK in part.columns for part in parts):
        keys = (part.columns.get(MASK, np.zeros((len(part), KEY_BYTES), np.uint8)) for part in parts)
        found[MASK] = np.concatenate(list(keys))
        shards = (part.columns.get(f"{MASK}_shard", np.full(len(part), -1, np.int32)) for part in parts)
        found[f"{MASK}_shard"] = np.concatenate([own[each] for own, each in zip(new, shards, strict=True)])
    return found


def _without_twins(columns: dict[str, np.ndarray], order: np.ndarray) -> np.ndarray:
    """The order without pictures whose rows were there before, as one check leaves them out.

    Of a picture with variants the first row counts for all.
    """
    joined = np.concatenate([*(columns[part] for part in PARTS), columns["is_prior"][:, None]], axis=1)[order]
    codes = np.ascontiguousarray(joined).view(f"V{joined.shape[1]}").reshape(-1)
    if GROUP not in columns:
        return order[np.sort(np.unique(codes, return_index=True)[1])]
    groups = columns[GROUP][order]
    begins = np.diff(groups, prepend=groups[0] - 1) != 0
    kept = np.zeros(begins.sum(), bool)
    kept[np.unique(codes[begins], return_index=True)[1]] = True
    return order[kept[np.cumsum(begins) - 1]]


def _texts(parts: Sequence[Index], which: str, order: np.ndarray) -> Iterator[bytes]:
    starts = np.cumsum([0, *map(len, parts)])
    places = np.searchsorted(starts, order, side="right") - 1
    for place, row in zip(places.tolist(), (order - starts[places]).tolist(), strict=True):
        yield parts[place].raw_text(which, row)
