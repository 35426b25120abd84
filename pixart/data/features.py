"""Encoded datasets on disk, of whichever layout, and the list by which one is found again."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch

from ..files.atomic import write_atomically
from ..files.documents import load_json, parse_json
from ..files.inside import is_plain_name
from ..files.regular import TABLE_BYTES, read_text
from ..quoting import shorten
from .buckets import Bins
from .examples import Example, FeatureSet
from .original_features import find_original_features, is_original
from .pairs import PAIRS, open_pairs
from .storage.index import (
    INDEX_SUFFIX,
    MANIFEST,
    VARIED_VERSION,
    VARYING,
    VERSION,
    Index,
    make_index,
    open_index,
    write_index,
)
from .storage.merging import merge_indexes
from .storage.rows import GROUP, KEY_BYTES, MASK, PARTS, Rows
from .storage.shards import OpenShards, ShardFolder
from .streams.reading import is_stream, open_stream
from .variety.joined import JoinedFeatures


def open_features(path: str | Path | Mapping[str, float]) -> FeatureSet:
    """The encoded dataset at path: the list or folder of a cache, the root of features in PixArt-alpha's layout, a
    folder of pairs, or the folder or address of a stream. Of several {path: share} all, each with its share.

    Raises FileNotFoundError and ValueError as open_cached, find_original_features and open_stream do.
    """
    if isinstance(path, Mapping):
        return JoinedFeatures([open_features(each) for each in path], list(path.values()))
    if is_stream(path):
        return open_stream(path)
    path = Path(path)
    if (path / PAIRS).is_file():
        return open_pairs(path)
    return find_original_features(path) if path.is_dir() and is_original(path) else open_cached(path)


def complete_index(rows: Rows, null_key: str, shards: ShardFolder) -> Index:
    """The index of rows (see index.make_index). Raises FileNotFoundError while some of their entries are missing."""
    keys = [rows.keys(part)[rows.has(part)] for part in (*PARTS, MASK)]
    keys.append(np.frombuffer(bytes.fromhex(null_key), np.uint8).reshape(1, -1))
    wanted = np.unique(np.concatenate(keys).view(f"V{KEY_BYTES}").reshape(-1))
    missing = int((shards.find(wanted.view(np.uint8).reshape(-1, KEY_BYTES)) < 0).sum())
    if missing:
        raise _incomplete(missing, len(wanted), shards.folder)
    return make_index(rows, null_key, shards)


def _incomplete(missing: int, wanted: int, folder: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"Cache is not complete: got {missing} of {wanted} entries missing in {shorten(str(folder), 300)}, expected "
        f"all. Let the other processes finish, or encode the dataset again; only those are encoded."
    )


def write_list(path: Path, index: Index, settings: dict, notes: Sequence[str] = (), **more) -> None:
    """Write a dataset's list: an index, and then the small file that names it, in the place of an older one.

    settings: the fields of EncodeSettings. more: plain values to keep with them.
    """
    old, name = _index_of(path), f"{path.stem}.{index.fingerprint()[:16]}{INDEX_SUFFIX}"
    if not _is_index(path.with_name(name)):  # else it is the same, and others may have it open
        write_index(path.with_name(name), index.columns)
    head = {
        "version": index.version,
        "settings": settings,
        "null_caption": index.null_key,
        "notes": list(notes),
        "pictures": len(index),
        "identity": index.identify(),
        "index": name,
        **more,
    }
    text = json.dumps(head, ensure_ascii=False, indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    if old is not None and old.name != name:
        with contextlib.suppress(OSError):  # Windows keeps what another process has mapped
            old.unlink(missing_ok=True)


def _part(path: Path, which: int, count: int) -> Path:
    return path.with_name(f"{path.stem}.{which}-of-{count}.part")


def write_part(
    path: Path, index: Index, settings: dict, notes: Sequence[str], share: tuple[int, int], run: str
) -> None:
    """Write the list of a share, (which, of how many), of the dataset whose list is to be at path.

    run: what tells this encoding from others: only shares of one are put together.
    """
    write_list(_part(path, *share), index, settings, notes, run=run)


def merge_parts(path: Path, count: int, run: str) -> list[int]:
    """Write the list of the whole dataset from those of its shares. Returns the shares that have none yet.

    Whoever ends last finds all of them; two that end at once write the same.
    """
    parts = {which: _read_part(_part(path, which, count), run) for which in range(1, count + 1)}
    missing = [which for which, part in parts.items() if part is None]
    if not missing:
        heads, indexes = zip(*parts.values(), strict=True)
        notes = [note for head in heads for note in head["notes"]]
        write_list(path, merge_indexes(indexes), heads[0]["settings"], notes)
    return missing


def _read_part(path: Path, run: str) -> tuple[dict, Index] | None:
    for _ in range(2):  # its writer may put another one in its place meanwhile
        try:
            head = load_json(path)
            if head["run"] != run:
                return None
            return head, open_index(_index_of(path))
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise _wrong_list(path) from error
    return None


def _is_index(file: Path) -> bool:
    try:
        open_index(file)
    except (OSError, ValueError):
        return False
    return True


def _index_of(path: Path) -> Path | None:
    """The file that a list names, if there is such a list."""
    try:
        name = load_json(path)["index"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path.with_name(name) if is_plain_name(name) and name.endswith(INDEX_SUFFIX) else None


class CachedFeatures:
    """A FeatureSet over a cache: only what is asked for is read. It can be copied into other processes.

    path: the dataset's list, with which open_features gives the same again. settings: the fields of EncodeSettings.
    notes: what was noticed when it was encoded, in lines. identity: of what is encoded, wherever the cache lies; its
    keys are hashes of contents, models and settings. Where pictures have variants, each picture is one of the set.
    varying: what its list has that says how pictures are drawn and weighed, see index.VARYING.
    """

    def __init__(self, index: Index, path: Path, content: dict, identity: str):
        self.index, self.path, self.shards = index, path, OpenShards(path.parent)
        self.settings, self.identity = content["settings"], identity
        self.notes = [str(note) for note in content.get("notes", ())]
        self.varying = [name for name in VARYING if name in index.columns]
        self._starts = _starts_of(index.columns.get(GROUP))
        self.bins, self.is_prior, self.repeats = index.bins, index.is_prior, index.columns.get("repeats", ())
        if self._starts is not None:
            firsts = self._starts[:-1]
            self.bins, self.is_prior = Bins(index.bins.sizes, index.bins.ids[firsts]), index.is_prior[firsts]
            self.repeats = self.repeats[firsts] if len(self.repeats) else ()
        lost = index.lost(path.parent)
        if lost.any():
            raise _incomplete(index.count_entries(lost), index.count_entries(), path.parent)

    @property
    def null_caption(self) -> torch.Tensor:
        return self.shards.tensor(*self.index.null_place, "caption")

    def name_of(self, index: int) -> str:
        return self.index.text("name", self._rows(index)[0])

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> Example:
        """A picture in its first variant."""
        row = self._rows(index)[0]
        return self._example(row, row)

    def variants(self, index: int) -> tuple[list[int], list[int]]:
        """The rows of a picture's different captions, and of its different views."""
        captions: dict = {}
        views: dict = {}
        for row in self._rows(index):
            captions.setdefault(self.index.place("caption", row), row)
            views.setdefault(self.index.place("picture", row), row)
        return list(captions.values()), list(views.values())

    def variants_of(self, index: int) -> tuple[list[Example], list[Example]]:
        """(one example for each caption of a picture, one for each of its views)."""
        captions, views = self.variants(index)
        return [self._example(row, views[0]) for row in captions], [self._example(captions[0], row) for row in views]

    def draw(self, index: int, rng: Random) -> Example:
        """A picture in one of its views, with one of its captions."""
        captions, views = self.variants(index)
        return self._example(*(rows[rng.randrange(len(rows))] for rows in (captions, views)))

    def _rows(self, index: int) -> range:
        if self._starts is None:
            return range(index, index + 1)
        return range(int(self._starts[index]), int(self._starts[index + 1]))

    def _example(self, caption: int, view: int) -> Example:
        """What is in a row, but for the caption in another one."""
        columns, value = self.index.columns, self.index.value
        picture = self.index.place("picture", view)
        hint = self.index.place("hint", view)
        mask = self.index.place(MASK, view) if MASK in columns else None
        return Example(
            latent=self.shards.tensor(*picture, "mean"),
            deviation=self.shards.tensor(*picture, "deviation") if value("has_deviation", view) else None,
            caption=self.shards.tensor(*self.index.place("caption", caption), "caption"),
            size_px=tuple(value("size_px", view).tolist()),
            aspect_ratio=float(value("aspect_ratio", view)),
            hint=None if hint is None else self.shards.tensor(*hint, "mean"),
            is_prior=bool(value("is_prior", view)),
            text=self.index.text("text", caption),
            mask=None if mask is None else self.shards.tensor(*mask, MASK),
            weight=float(value("weight", view)) if "weight" in columns else 1.0,
        )


def _starts_of(groups: np.ndarray | None) -> np.ndarray | None:
    """(G + 1,) where each group of rows begins, and the end; None without groups."""
    if groups is None:
        return None
    return np.concatenate([[0], np.flatnonzero(np.diff(groups)) + 1, [len(groups)]])


def open_cached(path: str | Path) -> CachedFeatures:
    """A dataset that was encoded before. path: its list, or a cache's folder that holds a single one.

    Raises FileNotFoundError where there is none, or entries are missing, and ValueError for another file.
    """
    path = Path(path)
    lists = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.is_file() else []
    if not lists:
        raise FileNotFoundError(
            f"Encoded dataset not found: got {shorten(str(path), 300)}, expected {MANIFEST}. Encode a dataset first."
        )
    if len(lists) > 1:
        names = ", ".join(entry.name for entry in lists)
        raise ValueError(
            f"Which encoded dataset is meant: got {names} in {shorten(str(path), 300)}, expected one. Enter the file's "
            f"path."
        )
    try:
        return _open_list(lists[0])
    except (ValueError, KeyError, TypeError) as error:
        raise _wrong_list(lists[0]) from error


def _open_list(path: Path) -> CachedFeatures:
    content = parse_json(read_text(path, TABLE_BYTES), TABLE_BYTES)
    if content["version"] not in (VERSION, VARIED_VERSION):
        raise ValueError("another version")
    if "items" in content:  # as lists were before they had an index
        index = complete_index(Rows(content["items"]), content["null_caption"], ShardFolder(path.parent))
        return CachedFeatures(index, path, content, index.identify())
    file = _index_of(path)
    if file is None:
        raise ValueError("no name of an index")
    try:
        index = open_index(file)
    except FileNotFoundError:
        if file != _index_of(path):  # another process has just put a new list in the place of this one
            return _open_list(path)
        raise
    return CachedFeatures(index, path, content, str(content["identity"]))


def _wrong_list(path: Path) -> ValueError:
    return ValueError(
        f"Not an encoded dataset: got '{path.name}', expected a list of version {VERSION} with pictures in it. "
        f"Encode the dataset again."
    )
