"""A folder of safetensors shards as a table from content keys to tensors, which many processes may add to.

A shard gets its name when it is whole, under a name that no other writer has; what is in the folder is read off the
shards themselves, so there is no index that could be wrong. Nothing is ever overwritten.
"""

import logging
import secrets
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...files.atomic import write_atomically
from ...quoting import shorten
from ..identity import digest
from .rows import KEY_BYTES

log = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 60.0  # what a killed process loses at most
_OPEN_FILES = 32
_CODE = np.dtype(f"V{KEY_BYTES}")
_ABANDONED_SECONDS = 24 * 3600.0


class OpenShards:
    """Reads tensors of the shards in a folder, a few of which stay open. It can be copied into other processes."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._open: OrderedDict = OrderedDict()

    def tensor(self, shard: str, key: str, part: str) -> torch.Tensor:
        """A tensor of an entry. Raises OSError for a shard that has changed since it was listed."""
        try:
            return self._file(shard).get_tensor(f"{key}.{part}")
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"Cache file cannot be read: got {shorten(error, 200)} for {shorten(shard, 80)} in "
                f"{shorten(str(self.folder), 300)}, expected it as it was when the dataset was opened. Encode the "
                f"dataset again; only what is lost is encoded."
            ) from error

    def _file(self, shard: str):
        if shard not in self._open:
            self._open[shard] = safe_open(self.folder / shard, framework="pt")
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}


class ShardFolder:
    """Finds entries by key; an entry is a few named tensors. It can be copied into other processes.

    What the shards hold is kept in columns, 28 bytes an entry. names: of the shards. forms: what entries are made of,
    {part: shape}, each once.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.names: list[str] = []
        self.forms: list[dict[str, tuple[int, ...]]] = []
        self._form_numbers: dict[tuple, int] = {}
        self._codes, self._places = np.zeros(0, _CODE), np.zeros((0, 2), np.int32)  # sorted; (shard, form) of each
        self._known: set[str] = set()
        self._shards = OpenShards(folder)
        self.scan()

    def scan(self) -> None:
        """Take notice of the shards that have come since."""
        found = []
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []:
            if path.name not in self._known and not path.name.startswith(".") and path.is_file():  # and no pipe
                found += self._note(path)
        if found:
            codes, places = zip(*found, strict=True)
            joined = np.concatenate([self._codes, *codes])
            # Of an entry that several writers made the first one counts.
            self._codes, firsts = np.unique(joined, return_index=True)
            self._places = np.concatenate([self._places, *places])[firsts]

    def _note(self, path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
        """[(codes, places)] of what a shard holds; none for one that cannot be read."""
        self._known.add(path.name)
        entries: dict[str, list] = {}
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    key, _, part = name.partition(".")
                    entries.setdefault(key, []).append((part, tuple(file.get_slice(name).get_shape())))
        except (SafetensorError, OSError) as error:
            log.warning("Cache shard %s cannot be read (%s); what was in it is encoded again.", path.name, error)
            return []
        if not entries:
            return []
        self.names.append(path.name)
        places = [(len(self.names) - 1, self._form(tuple(sorted(parts)))) for parts in entries.values()]
        codes = np.frombuffer(b"".join(map(_code, entries)), _CODE)
        return [(codes, np.array(places, np.int32))]

    def _form(self, parts: tuple) -> int:
        if parts not in self._form_numbers:
            self._form_numbers[parts] = len(self.forms)
            self.forms.append(dict(parts))
        return self._form_numbers[parts]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """(N, 20) uint8 -> (N,) the numbers of these entries, -1 for those that are not there."""
        codes = np.ascontiguousarray(keys).view(_CODE).reshape(-1)
        if not len(self._codes):
            return np.full(len(codes), -1, np.int64)
        places = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return np.where(self._codes[places] == codes, places, -1)

    def shards_of(self, entries: np.ndarray) -> np.ndarray:
        """The number of each entry's shard; -1 stays."""
        return np.where(entries >= 0, self._places[entries, 0], -1)

    def forms_of(self, entries: np.ndarray) -> np.ndarray:
        """The number of each entry's form."""
        return self._places[entries, 1]

    def _place(self, key: str) -> tuple[int, int] | None:
        code = np.frombuffer(_code(key), np.uint8)
        entry = int(self.find(code[None])[0])
        return None if entry < 0 else tuple(self._places[entry].tolist())

    def __contains__(self, key: str) -> bool:
        return self._place(key) is not None

    def shape_of(self, key: str, part: str) -> tuple[int, ...]:
        """The shape of a tensor of an entry, without reading it. Raises KeyError when there is none."""
        return self.forms[self._known_place(key)[1]][part]

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of an entry. Raises KeyError when there is none, OSError when it has changed since."""
        shard, form = self._known_place(key)
        return {part: self._shards.tensor(self.names[shard], key, part) for part in self.forms[form]}

    def _known_place(self, key: str) -> tuple[int, int]:
        place = self._place(key)
        if place is None:
            raise KeyError(key)
        return place


def _code(key: str) -> bytes:
    """The bytes that stand for a key: itself, or of other texts than digests a digest."""
    try:
        data = bytes.fromhex(key)
    except ValueError:
        data = b""
    return data if len(data) == KEY_BYTES else bytes.fromhex(digest(key))


class ShardWriter:
    """A context that collects entries and writes them as shards, the last one when it ends, however it ends."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._tensors: dict[str, torch.Tensor] = {}
        self._bytes, self._since = 0, time.monotonic()

    def __enter__(self) -> "ShardWriter":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        return self

    def __exit__(self, *_) -> None:
        self.flush()

    def add(self, key: str, parts: dict[str, torch.Tensor]) -> None:
        """Add an entry. key: without a dot."""
        for part, tensor in parts.items():
            tensor = tensor.detach().cpu().clone().contiguous()
            self._tensors[f"{key}.{part}"] = tensor
            self._bytes += tensor.nbytes
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has been added. Raises OSError saying what to do, such as when the disk is full."""
        if self._tensors:
            path = self.folder / f"{secrets.token_hex(12)}.safetensors"
            try:
                write_atomically(path, lambda temporary: save_file(self._tensors, temporary))
            except (OSError, SafetensorError) as error:
                raise OSError(
                    f"Cache cannot be written: got {shorten(error, 200)} for {self._bytes / 2**20:.0f} MiB, expected "
                    f"room in {shorten(str(self.folder), 300)}. Free space there or choose another folder; what is in "
                    f"it stays and is used."
                ) from error
        self._tensors, self._bytes, self._since = {}, 0, time.monotonic()

    def _remove_abandoned(self) -> None:
        """Temporary files of writers that were killed; a day old, since another writer's are being written now."""
        for path in self.folder.glob(".*.safetensors.*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
            except OSError:  # gone meanwhile, or not ours
                continue
