"""A folder of safetensors shards as a table from content keys to tensors, which many processes may add to.

A shard gets its name when it is whole, under a name that no other writer has; what is in the folder is read off the
shards themselves, so there is no index that could be wrong. Nothing is ever overwritten.
"""

import logging
import secrets
import time
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...files.atomic import write_atomically
from ...quoting import shorten

log = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 60.0  # what a killed process loses at most
_OPEN_FILES = 32
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
    """Reads entries by key; an entry is a few named tensors. It can be copied into other processes."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._places: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {}  # key -> shard, {part: shape}
        self._known: set[str] = set()
        self._shards = OpenShards(folder)
        self.scan()

    def scan(self) -> None:
        """Take notice of the shards that have come since."""
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []:
            if path.name not in self._known and not path.name.startswith(".") and path.is_file():  # and no pipe
                self._note(path)

    def _note(self, path: Path) -> None:
        self._known.add(path.name)
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            log.warning("Cache shard %s cannot be read (%s); what was in it is encoded again.", path.name, error)
            return
        for name, shape in shapes.items():
            key, _, part = name.partition(".")
            self._places.setdefault(key, (path.name, {}))
            if self._places[key][0] == path.name:  # another writer's twin of an entry adds nothing
                self._places[key][1][part] = shape

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def shape_of(self, key: str, part: str) -> tuple[int, ...]:
        """The shape of a tensor of an entry, without reading it."""
        return self._places[key][1][part]

    def has_part(self, key: str, part: str) -> bool:
        """Whether an entry has a tensor of this name."""
        return part in self._places[key][1]

    def shard_of(self, key: str) -> str:
        """The name of the file with an entry."""
        return self._places[key][0]

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of an entry. Raises KeyError when there is none, OSError when it has changed since."""
        shard, shapes = self._places[key]
        return {part: self._shards.tensor(shard, key, part) for part in shapes}


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
