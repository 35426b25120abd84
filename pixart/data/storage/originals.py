"""The list of features in PixArt-alpha's files, so that a second start opens none of them.

It lies in the dataset's folder and holds of each picture the names of its two files, their sizes and times, and the
size of the latent. It counts while the folders and the list that it was made of have their times.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...files.atomic import write_atomically
from ...files.documents import load_json
from ...files.inside import is_plain_name
from ..buckets import Bins
from ..identity import digest
from .columns import ColumnFile
from .index import INDEX_SUFFIX, write_index

log = logging.getLogger(__name__)

VERSION = 1
TEXTS = ("caption", "latent", "text")
_NUMBERS = {
    "size_px": (np.int32, (2,)),
    "aspect_ratio": (np.float64, ()),
    "stamps": (np.int64, (4,)),  # bytes and time of the caption's file, and of the latent's
}


@dataclass(frozen=True)
class OriginalEntry:
    """The two files of a picture and what the list says of it. size_px: (height, width)."""

    caption: Path
    latent: Path
    size_px: tuple[int, int]
    aspect_ratio: float
    text: str = ""


class ListedEntries(Sequence[OriginalEntry]):
    """Entries by number, read from their list. identity, bins: of all of them."""

    def __init__(self, columns: ColumnFile, folders: tuple[Path, Path], identity: str):
        self._columns, self._folders, self.identity = columns, folders, identity
        self.bins = Bins(columns["sizes"], columns["bin"])

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, number: int) -> OriginalEntry:
        """Raises ValueError when one of the files is another than when they were listed, OSError when it is gone."""
        names = [self._text(which, number) for which in TEXTS]
        paths = [folder / name for folder, name in zip(self._folders, names, strict=False)]
        if _stamps(*paths) != self._columns.read("stamps", number, number + 1)[0].tolist():
            raise ValueError(
                f"Feature files have changed: got another {paths[1].name} or {paths[0].name} than when they were "
                f"listed, expected the same. Remove {self._columns.path.name} and start again."
            )
        size = tuple(self._columns.read("size_px", number, number + 1)[0].tolist())
        return OriginalEntry(*paths, size, float(self._columns.read("aspect_ratio", number, number + 1)[0]), names[2])

    def __reduce__(self):
        return _reopen, (self._columns.path, self._folders, self.identity)

    def _text(self, which: str, number: int) -> str:
        ends = self._columns.read(f"{which}_end", max(number - 1, 0), number + 1)
        return self._columns.read(f"{which}_bytes", int(ends[0]) if number else 0, int(ends[-1])).tobytes().decode()


def _reopen(path: Path, folders: tuple[Path, Path], identity: str) -> ListedEntries:
    return ListedEntries(ColumnFile(path), folders, identity)


def _stamps(*paths: Path) -> list[int]:
    return [number for path in paths for number in (os.stat(path).st_size, os.stat(path).st_mtime_ns)]


def source_of(folders: Sequence[Path], listed: Path | None) -> str:
    """What tells the files of a dataset as a whole from others: the times of their folders and of their list."""
    told = [(path.name, path.stat().st_mtime_ns, path.stat().st_size if path.is_file() else 0) for path in folders]
    told += [(listed.name, listed.stat().st_mtime_ns, listed.stat().st_size)] if listed else []
    return digest(json.dumps(told))


def open_entries(path: Path, folders: tuple[Path, Path], source: str) -> ListedEntries | None:
    """The entries that a list holds, None where there is no list of this source."""
    try:
        head = load_json(path)
        if (head["version"], head["source"]) != (VERSION, source) or not is_plain_name(head["index"]):
            return None
        columns = ColumnFile(path.with_name(head["index"]))
        count, ends = len(columns["bin"]), [f"{which}_end" for which in TEXTS]
        fits = all(len(columns[name]) == count for name in (*_NUMBERS, *ends))
        right = all(columns[name].dtype == kind for name, (kind, _) in _NUMBERS.items())
        if not (count and fits and right and int(columns["bin"].max()) < len(columns["sizes"])):
            return None
        return ListedEntries(columns, folders, str(head["identity"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_entries(
    path: Path, entries: Sequence[OriginalEntry], bins: Bins, identity: str, source: str, name_of: Callable
) -> None:
    """Write the list of entries; where there is no room or right to, the next start opens the files again.

    name_of: of an entry's file, below its folder.
    """
    columns: dict[str, np.ndarray] = {
        "bin": bins.ids,
        "sizes": bins.sizes.astype(np.int32),
        "size_px": np.array([entry.size_px for entry in entries], np.int32),
        "aspect_ratio": np.array([entry.aspect_ratio for entry in entries], np.float64),
        "stamps": np.array([_stamps(entry.caption, entry.latent) for entry in entries], np.int64),
    }
    for which in TEXTS:
        texts = [(entry.text if which == "text" else name_of(getattr(entry, which))).encode() for entry in entries]
        columns[f"{which}_end"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
        columns[f"{which}_bytes"] = np.frombuffer(b"".join(texts), np.uint8)
    index = path.with_name(f"{path.stem}.{source[:16]}{INDEX_SUFFIX}")
    head = json.dumps({"version": VERSION, "source": source, "identity": identity, "index": index.name})
    try:
        write_index(index, columns)
        write_atomically(path, lambda temporary: temporary.write_text(head, encoding="utf-8"))
    except OSError as error:
        log.info("The list of the features is not kept (%s): each start opens their files.", error)
