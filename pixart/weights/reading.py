"""Reads files of weights in every form that PixArt is published in; `saving.py` writes them."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..config import PixArtConfig
from .checking import check_weights
from .detection import Detection, explain_detection
from .folders import ModelFolder, open_folder
from .layouts import NULL_CAPTION_KEY, parts_to_merge, to_original, unwrap
from .pickles import ZIP_MAGIC, read_pth

log = logging.getLogger(__name__)

_CHUNK_BYTES = 64 * 2**20  # mapped at a time while tensors are copied into memory of their own
_HEADER_LIMIT = 100 * 10**6  # of a safetensors file, the format's own limit
# First bytes -> what the file is instead of weights.
_OTHER_FILES = {
    b"version https://git-lfs": (
        "a Git LFS pointer",
        "Fetch the file itself with 'git lfs pull' or by its download link",
    ),
    b"<": ("a web page", "Download the file itself; a page that asks to log in was saved in its place"),
    b"GGUF": ("a GGUF file", "Choose safetensors or .pth weights; this format is not supported"),
    b"\x1f\x8b": ("a gzip archive", "Unpack it first"),
    b"7z\xbc\xaf": ("a 7z archive", "Unpack it first"),
    b"Rar!": ("a rar archive", "Unpack it first"),
    b"\x89PNG": ("a picture", "Choose the checkpoint"),
    b"\xff\xd8\xff": ("a picture", "Choose the checkpoint"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A model read from disk, ready for `PixArt(config).load_state_dict(state_dict, assign=True)`.

    state_dict: original layout, checked; without the position grid, and without a null caption that says nothing.
    metadata: the safetensors header's texts.
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    detection: Detection
    metadata: dict[str, str]

    @property
    def config(self) -> PixArtConfig:
        return self.detection.config

    @property
    def has_null_caption(self) -> bool:
        """Whether the file brought a learned null caption."""
        return NULL_CAPTION_KEY in self.state_dict


def read_checkpoint(
    path: str | os.PathLike,
    *,
    weights: str = "ema",
    file_variant: str | None = None,
    **hints,
) -> Checkpoint:
    """Read a PixArt from a file (.pth, .safetensors, .bin, ...) or a diffusers folder.

    weights: "ema" or "model", see `layout.unwrap`. file_variant: "fp16" and the like, for folders.
    hints: `variant` and fields of PixArtConfig, see `detection.explain_detection`.
    Tensors are mapped from the file as they are; those that diffusers has in parts are read and merged one by one.
    Raises FileNotFoundError for a missing file or shard and ValueError for everything else, naming the file.
    """
    path = Path(path)
    folder = open_folder(path, file_variant) if path.is_dir() else ModelFolder(path, (path,))
    with naming(path):
        tensors, metadata = _read_all(folder, lambda content: unwrap(content, weights))
        detection = explain_detection(
            tensors,
            metadata=metadata,
            model_config=folder.model_config,
            vae_config=folder.vae_config,
            name="/".join(path.absolute().parts[-4:]),  # a download cache names the model three folders up
            **hints,
        )
        return finish_checkpoint(path, tensors, detection, metadata)


def finish_checkpoint(path: Path, tensors: dict, detection: Detection, metadata: dict[str, str]) -> Checkpoint:
    """A Checkpoint of tensors in any layout, which are emptied on the way. Raises ValueError as `read_checkpoint`."""
    state_dict = to_original(tensors, consume=True)
    _settle_null_caption(state_dict, detection.config.caption_length)
    check_weights(state_dict, detection.config)
    for conflict in detection.conflicts:
        log.warning("%s: taken for %s (%s), but %s", path.name, detection.family, detection.signs["family"], conflict)
    return Checkpoint(path, state_dict, detection, metadata)


def read_tensors(
    path: str | os.PathLike, choose: Callable[[object], dict] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of one file, whatever its name ends in. Mapped from the file where the format allows.

    choose: picks the wanted tensors out of everything in the file, see `pth.read_pth`; all at the top by default.
    Raises FileNotFoundError, or ValueError naming the file and saying what it is instead of weights.
    """
    path = Path(path)
    with naming(path):
        kind = _recognise(path)
        choose = choose or _top_level
        if kind == "safetensors":
            return _read_safetensors(path, choose)
        metadata: dict[str, str] = {}

        def choose_and_note(content):
            metadata.update(_texts_of(content))
            return choose(content)

        return read_pth(path, choose_and_note, parts_to_merge), metadata


@contextmanager
def naming(path: Path):
    """Put the file's name into every ValueError that does not hold it yet."""
    try:
        yield
    except ValueError as error:
        if path.name in str(error):
            raise
        raise ValueError(f"{path.name}: {error}") from error


def _recognise(path: Path) -> str:
    """Tell "safetensors" from "torch" by content. Raises ValueError saying what the file is else."""
    if not path.is_file():
        raise FileNotFoundError(f"File not found: got '{path}', expected a checkpoint. Choose another file.")
    with path.open("rb") as file:
        head = file.read(512)
    size = path.stat().st_size
    if not head:
        raise ValueError(f"Empty file: got 0 bytes in '{path.name}', expected a checkpoint. Download the file again.")
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= _HEADER_LIMIT:
        if header > size - 8:
            raise ValueError(
                f"Truncated file: got {size} bytes in '{path.name}', expected at least the {header} of its header. "
                f"Download the file again."
            )
        return "safetensors"
    for start, (kind, remedy) in _OTHER_FILES.items():
        if head.lstrip().startswith(start):
            raise ValueError(f"Not a checkpoint: got {kind} in '{path.name}', expected weights. {remedy}.")
    if head[257:262] == b"ustar":
        raise ValueError(
            f"Not a checkpoint: got a tar archive in '{path.name}', expected weights. Unpack it, or save a checkpoint "
            f"from before 2018 again with a newer PyTorch."
        )
    if head.startswith((ZIP_MAGIC, b"\x80")):
        return "torch"
    raise ValueError(
        f"Not a checkpoint: got a file of an unknown kind ('{path.name}', starting with {head[:8]!r}), expected "
        f"safetensors or .pth weights. Choose the checkpoint, or download it again."
    )


def _top_level(content: object) -> dict:
    """What `read_tensors` gives without `choose`: the tensors of a bare or `state_dict`-wrapped file."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(
            f"No weights in this file: got a {type(content).__name__} object, expected a dict of tensors. "
            f"Choose a checkpoint that was saved as a state dict."
        )
    return {key: value for key, value in content.items() if isinstance(key, str) and hasattr(value, "shape")}


def _texts_of(content: object) -> dict[str, str]:
    """The metadata that `save_checkpoint` puts next to the state dict of a .pth."""
    texts = content.get("metadata") if isinstance(content, Mapping) else None
    items = texts.items() if isinstance(texts, Mapping) else ()
    return {key: value for key, value in items if isinstance(key, str) and isinstance(value, str)}


class _Named:
    """A tensor of a safetensors file before it is read: its shape alone."""

    def __init__(self, name: str, shape: Iterable[int]):
        self.name = name
        self.shape = tuple(shape)


def _read_safetensors(path: Path, choose: Callable[[object], dict]) -> tuple[dict, dict]:
    try:
        with safe_open(path, framework="pt") as file:
            content = {name: _Named(name, file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
            wanted = choose(content)
            parts = {name: wanted[name] for name in wanted.keys() & parts_to_merge(wanted)}
            mapped = {name: file.get_tensor(named.name) for name, named in wanted.items() if name not in parts}
        return mapped | _read_unmapped(path, parts), metadata
    except SafetensorError as error:
        raise ValueError(
            f"Truncated or damaged file: got unreadable safetensors in '{path.name}' ({error}), expected complete "
            f"weights. Download the file again."
        ) from error


def _read_unmapped(path: Path, wanted: Mapping[str, _Named]) -> dict[str, torch.Tensor]:
    """Copies of the tensors; the file is mapped again every few of them, since touched pages of a mapping stay."""
    tensors, names = {}, list(wanted)
    while names:
        with safe_open(path, framework="pt") as file:
            copied = 0
            while names and copied < _CHUNK_BYTES:
                name = names.pop(0)
                tensors[name] = file.get_tensor(wanted[name].name).clone()
                copied += tensors[name].nbytes
    return tensors


def _read_all(folder: ModelFolder, choose: Callable[[object], dict]) -> tuple[dict, dict]:
    tensors, metadata, origin = {}, {}, {}
    for file in folder.files:
        found, texts = read_tensors(file, choose)
        for name in found:
            if name in origin:
                raise ValueError(
                    f"Tensor twice in shards: got '{name}' in '{origin[name]}' and '{file.name}', expected it once. "
                    f"Download the folder again."
                )
        origin |= dict.fromkeys(found, file.name)
        tensors |= found
        metadata |= texts
    missing = [name for name in folder.weight_map if name not in tensors]
    if missing:
        raise ValueError(
            f"Truncated shard: got no '{missing[0]}' in '{folder.weight_map[missing[0]]}', expected it there as the "
            f"index says. Download this shard again."
        )
    return tensors, metadata


def _settle_null_caption(state_dict: dict, caption_length: int) -> None:
    """Drop a null caption that is all zeros (a stand-in that somebody saved) or too short; cut a longer one."""
    null = state_dict.get(NULL_CAPTION_KEY)
    if null is None or null.ndim != 2 or not null.dtype.is_floating_point:
        return
    if null.shape[0] < caption_length or not null.float().any():
        del state_dict[NULL_CAPTION_KEY]
        log.info("No learned null caption in this checkpoint; empty captions are encoded instead.")
    elif null.shape[0] > caption_length:
        state_dict[NULL_CAPTION_KEY] = null[:caption_length]
