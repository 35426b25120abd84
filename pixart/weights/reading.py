"""Reads files of weights in every form that PixArt is published in; `saving.py` writes them."""

import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ..config import PixArtConfig
from ..quoting import list_names, plain, shorten
from .checking import check_weights
from .detection import Detection, detect
from .distributed import is_distributed, open_distributed
from .folders import TRANSFORMER_STEMS, ModelFolder, find_weights, open_beside, open_folder
from .layouts import NULL_CAPTION_KEY, Weights, original_tensors, parts_to_merge
from .pickles import ZIP_MAGIC, open_pickled
from .quantised.forms import expand, is_quantised
from .quantised.gguf_file import open_gguf
from .quantised.gguf_header import MAGIC as GGUF_MAGIC
from .quantised.packed import expand_all
from .quantised.subclasses import refuse_subclasses
from .wrappers import identify_pixart

log = logging.getLogger(__name__)

_CHUNK_BYTES = 64 * 2**20  # mapped at a time while tensors are copied into memory of their own
_HEADER_LIMIT = 2**25  # bytes of a safetensors file's header; those of the largest models have some hundred kilobytes
_MOST_TENSORS = 10**5
# First bytes -> what the file is instead of weights.
_OTHER_FILES = {
    b"version https://git-lfs": (
        "a Git LFS pointer",
        "Fetch the file itself with 'git lfs pull' or by its download link",
    ),
    b"<": ("a web page", "Download the file itself; a page that asks to log in was saved in its place"),
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
    metadata: the safetensors header's texts. place, others, left: see `layouts.Weights`. folder: what
    lay around the weights, None where they are another file's part.
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    detection: Detection
    metadata: dict[str, str]
    place: str = ""
    others: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    folder: ModelFolder | None = None

    @property
    def config(self) -> PixArtConfig:
        return self.detection.config

    @property
    def remarks(self) -> tuple[str, ...]:
        """What whoever loads it should know, in words: what was guessed, overruled, left out, or is not honoured."""
        guessed = "; ".join(self.detection.guesses)
        others, family = list_names(self.others), self.detection.family
        return (
            *([f"guessed: {guessed}. Choose the variant if that is wrong"] if guessed else ()),
            *(
                f"taken for {family}, but {each}. Choose the variant if that is wrong"
                for each in self.detection.conflicts
            ),
            *([f"taken: {plain(self.place)}; also in the file: {others}"] if others else ()),
            *([f"left out: {list_names(self.left)}"] if self.left else ()),
            *(self.folder.remarks if self.folder else ()),
        )

    @property
    def has_null_caption(self) -> bool:
        """Whether the file brought a learned null caption."""
        return NULL_CAPTION_KEY in self.state_dict


def read_checkpoint(
    path: str | os.PathLike,
    *,
    weights: str = "ema",
    file_variant: str | None = None,
    packed: bool = False,
    **hints,
) -> Checkpoint:
    """Read a PixArt from a file (.pth, .safetensors, .bin, ...) or a diffusers folder.

    weights: "ema", "model" or the name of a place, see `wrappers.identify`. file_variant: "fp16" and the
    like, for folders. packed: GGUF's weights as `quantised.packed.Packed`, not as numbers.
    hints: `variant` and fields of PixArtConfig, see `detection.detect`.
    Tensors are mapped from the file as they are; those that diffusers has in parts are read and merged one by one.
    Raises FileNotFoundError for a missing file or shard and ValueError for everything else, naming the file.
    """
    path = Path(path)
    with naming(path):
        folder, opened = _open_model(path, file_variant)
        settings = quantisation_settings(folder.model_config)
        found = read_weights(opened, identify_pixart(opened.content, weights, opened.metadata), settings, packed=packed)
        detection = detect(
            found,
            model_config=folder.model_config,
            vae_config=folder.vae_config,
            pipeline=folder.pipeline,
            name="/".join(path.absolute().parts[-4:]),  # a download cache names the model three folders up
            **hints,
        )
        return replace(finish_checkpoint(path, found, detection), folder=folder)


def finish_checkpoint(path: Path, weights: Weights, detection: Detection) -> Checkpoint:
    """A Checkpoint of weights in any layout, which are emptied on the way. Raises ValueError as `read_checkpoint`."""
    state_dict = original_tensors(weights)
    _settle_null_caption(state_dict, detection.config.caption_length)
    check_weights(state_dict, detection.config)
    for conflict in detection.conflicts:
        log.warning("%s: taken for %s (%s), but %s", path.name, detection.family, detection.signs["family"], conflict)
    return Checkpoint(path, state_dict, detection, dict(weights.metadata), weights.place, weights.others, weights.left)


def read_tensors(
    path: str | os.PathLike, stems: Iterable[str] = TRANSFORMER_STEMS
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a file, whatever its name ends in, or of a folder. Mapped where the format allows.

    The tensors are those at the top, or in the `state_dict` there. stems: of a folder's files, see `find_weights`.
    Raises as `open_weights`.
    """
    opened = open_weights(path, stems)
    return expand_all(opened.read(top_level(opened))), opened.metadata


class Opened(Protocol):
    """Files of weights before any tensor is read.

    content: everything in them; what has a shape stands for a tensor. metadata: texts that are kept with the weights.
    """

    path: Path
    content: object
    metadata: dict[str, str]

    def read(self, wanted: Mapping, own: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """The wanted tensors of `content`, under any names: mapped, or copied into memory where own names them."""


def _open_model(path: Path, file_variant: str | None) -> tuple[ModelFolder, Opened]:
    if path.is_dir() and is_distributed(path):
        return ModelFolder(path, ()), open_distributed(path)
    folder = open_folder(path, file_variant) if path.is_dir() else open_beside(path)
    return folder, open_files(folder.files, folder.weight_map)


def open_weights(
    path: str | os.PathLike, stems: Iterable[str] = TRANSFORMER_STEMS, variant: str | None = None
) -> Opened:
    """Describe a file of weights, whatever its name ends in, or those that `find_weights` finds in a folder.

    Raises FileNotFoundError, or ValueError naming the file: for what is no file of weights, and for shards that do not
    belong together.
    """
    path = Path(path)
    return open_files(*find_weights(path, stems, variant)) if path.is_dir() else _open_file(path)


def open_files(files: Sequence[Path], weight_map: Mapping[str, str]) -> Opened:
    """Describe one file, or a model's shards as a whole. weight_map: of their index. Raises like `open_weights`."""
    opened = [_open_file(file) for file in files]
    return _join_shards(opened, weight_map) if weight_map or len(opened) > 1 else opened[0]


def read_weights(opened: Opened, weights: Weights, settings: Mapping | None = None, *, packed: bool = False) -> Weights:
    """The same with tensors in place of their descriptions; those that are to be merged are not mapped, and those that
    are quantised become plain numbers. settings: see `quantisation_settings`. packed: leaves GGUF's blocks as they are.
    """
    refuse_subclasses(opened.content, opened.path.name)
    tensors = opened.read(weights.tensors, parts_to_merge(weights.tensors))
    if is_quantised(tensors):
        tensors = expand(tensors, opened.path.name, settings=settings, metadata=weights.metadata)
    return replace(weights, tensors=tensors if packed else expand_all(tensors))


def quantisation_settings(model_config: Mapping | None) -> Mapping:
    """What a config.json says of quantised weights beside it; empty without a word of it."""
    settings = (model_config or {}).get("quantization_config")
    return settings if isinstance(settings, Mapping) else {}


@contextmanager
def naming(path: Path):
    """Put the file's name into every ValueError that does not hold it yet."""
    try:
        yield
    except ValueError as error:
        if path.name in str(error):
            raise
        raise ValueError(f"{path.name}: {shorten(error, 200)}") from error


def require_file(path: Path) -> None:
    """Raises FileNotFoundError for a missing file, ValueError for a pipe, device or socket, whose opening can block."""
    if not path.exists():
        raise FileNotFoundError(
            f"File not found: got {shorten(str(path), 300)}, expected a checkpoint. Choose another file."
        )
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe, device or socket"
        raise ValueError(
            f"Not a file: got {kind} named {shorten(path.name)}, expected a checkpoint. Choose another file."
        )


def _recognise(path: Path) -> str:
    """The key of _OPENERS, by content. Raises ValueError saying what the file is else."""
    require_file(path)
    with path.open("rb") as file:
        head = file.read(512)
    size = path.stat().st_size
    if not head:
        raise ValueError(
            f"Empty file: got 0 bytes in {shorten(path.name)}, expected a checkpoint. Download the file again."
        )
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= 100 * 10**6:  # the format's own limit
        if header > _HEADER_LIMIT:
            raise ValueError(
                f"Oversized header: got {header / 1e6:.0f} MB of names in {shorten(path.name)}, expected at most "
                f"{_HEADER_LIMIT / 1e6:.0f} MB. Save the weights again without other texts."
            )
        if header > size - 8:
            raise ValueError(
                f"Truncated file: got {size} bytes in {shorten(path.name)}, expected at least the {header} of its "
                f"header. Download the file again."
            )
        return "safetensors"
    for start, (kind, remedy) in _OTHER_FILES.items():
        if head.lstrip().startswith(start):
            raise ValueError(f"Not a checkpoint: got {kind} in {shorten(path.name)}, expected weights. {remedy}.")
    if head.startswith(GGUF_MAGIC):
        return "gguf"
    if head[257:262] == b"ustar":
        raise ValueError(
            f"Not a checkpoint: got a tar archive in {shorten(path.name)}, expected weights. Unpack it, or save a "
            f"checkpoint from before 2018 again with a newer PyTorch."
        )
    if head.startswith((ZIP_MAGIC, b"\x80")):
        return "torch"
    raise ValueError(
        f"Not a checkpoint: got a file of an unknown kind ({shorten(path.name)}, starting with {shorten(head[:8])}), "
        f"expected safetensors or .pth weights. Choose the checkpoint, or download it again."
    )


def _open_file(path: Path) -> Opened:
    with naming(path):
        return _OPENERS[_recognise(path)](path)


def top_level(opened: Opened) -> dict:
    """Name -> description of the tensors of a bare or `state_dict`-wrapped file."""
    content = opened.content
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{opened.path.name}: No weights in this file: got a {type(content).__name__} object, expected a dict of "
            f"tensors. Choose a checkpoint that was saved as a state dict."
        )
    return {key: value for key, value in content.items() if isinstance(key, str) and hasattr(value, "shape")}


class _NamedTensor(NamedTuple):
    """A tensor of a safetensors file before it is read."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _SafetensorsFile:
    path: Path
    content: dict[str, _NamedTensor]
    metadata: dict[str, str]

    def read(self, wanted: Mapping[str, _NamedTensor], own: Collection[str] = ()) -> dict[str, torch.Tensor]:
        copied = {name: wanted[name] for name in wanted if name in own}
        with _sound_safetensors(self.path), safe_open(self.path, framework="pt") as file:
            mapped = {name: file.get_tensor(place.name) for name, place in wanted.items() if name not in copied}
        with _sound_safetensors(self.path):
            return mapped | _read_unmapped(self.path, copied)


def _open_safetensors(path: Path) -> _SafetensorsFile:
    with _sound_safetensors(path), safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if len(names) > _MOST_TENSORS:
            raise ValueError(
                f"Too many tensors: got {len(names)} in {shorten(path.name)}, expected at most {_MOST_TENSORS}. Choose "
                f"another file."
            )
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        metadata = dict(file.metadata() or {})
    return _SafetensorsFile(path, {name: _NamedTensor(name, shape) for name, shape in shapes.items()}, metadata)


@contextmanager
def _sound_safetensors(path: Path):
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"Truncated or damaged file: got unreadable safetensors in {shorten(path.name)} ({shorten(error)}), "
            f"expected complete weights. Download the file again."
        ) from error


def _read_unmapped(path: Path, wanted: Mapping[str, _NamedTensor]) -> dict[str, torch.Tensor]:
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


_OPENERS = {"safetensors": _open_safetensors, "torch": open_pickled, "gguf": open_gguf}


class _ShardedTensor(NamedTuple):
    """A tensor of one of several files before it is read."""

    file: Opened
    inner: object

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape


@dataclass(frozen=True)
class _Shards:
    path: Path
    files: Sequence[Opened]
    content: dict[str, _ShardedTensor]
    metadata: dict[str, str]

    def read(self, wanted: Mapping[str, _ShardedTensor], own: Collection[str] = ()) -> dict[str, torch.Tensor]:
        tensors = {}
        for file in self.files:
            tensors |= file.read({name: value.inner for name, value in wanted.items() if value.file is file}, own)
        return tensors


def _join_shards(files: Sequence[Opened], weight_map: Mapping[str, str]) -> _Shards:
    content, metadata = {}, {}
    for file in files:
        for name, tensor in top_level(file).items():
            if name in content:
                raise ValueError(
                    f"Tensor twice in shards: got {shorten(name)} in {shorten(content[name].file.path.name)} and "
                    f"{shorten(file.path.name)}, expected it once. Download the folder again."
                )
            content[name] = _ShardedTensor(file, tensor)
        metadata |= file.metadata
    missing = [name for name in weight_map if name not in content]
    if missing:
        raise ValueError(
            f"Truncated shard: got no {shorten(missing[0])} in {shorten(weight_map[missing[0]])}, expected it there as "
            f"the index says. Download this shard again."
        )
    return _Shards(files[0].path.parent, files, content, metadata)


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
