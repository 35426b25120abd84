"""GGUF files as weights: packed blocks stay as they are, mapped from the file; T5 under its Hugging Face names."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...quoting import list_names, shorten
from .blocks import BLOCK_TYPES, BlockType
from .gguf_header import Header, StoredBlocks, read_header
from .packed import Packed, Packing

ARCHITECTURE = "general.architecture"
T5_ARCHITECTURES = ("t5", "t5encoder")
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # of a tensor that a converter laid out otherwise
_PACKED_END = ".weight"  # tables and norms are numbers at once
_BLOCK_PARTS = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
_LLAMA_BLOCK = re.compile(r"enc\.blk\.(\d{1,3})\.(\w+)\.weight")
_LLAMA_NAMES = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}


def hugging_face_name(name: str) -> str | None:
    """llama.cpp's name of a T5 encoder's tensor -> Hugging Face's; None for another."""
    match = _LLAMA_BLOCK.fullmatch(name)
    if match and match[2] in _BLOCK_PARTS:
        return f"encoder.block.{match[1]}.{_BLOCK_PARTS[match[2]]}.weight"
    return _LLAMA_NAMES.get(name)


def llama_name(name: str) -> str | None:
    """Hugging Face's name of a T5 encoder's tensor -> llama.cpp's; None for another."""
    match = re.fullmatch(r"encoder\.block\.(\d{1,3})\.(.+)\.weight", name)
    part = next((ours for ours, theirs in _BLOCK_PARTS.items() if match and theirs == match[2]), None)
    if part is not None:
        return f"enc.blk.{match[1]}.{part}.weight"
    return next((ours for ours, theirs in _LLAMA_NAMES.items() if theirs == name), None)


@dataclass(frozen=True)
class GGUFFile:
    """An `Opened` file (see `reading`): content holds what stands for its tensors, with their shapes."""

    path: Path
    content: dict[str, StoredBlocks]
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def read(self, wanted: Mapping[str, StoredBlocks], own: Collection[str] = ()) -> dict[str, torch.Tensor | Packed]:
        """The wanted tensors: numbers, or Packed for weights of two dimensions that are stored in blocks."""
        size = self.path.stat().st_size
        mapping = torch.UntypedStorage.from_file(str(self.path), False, size) if wanted else None
        return {name: self._read(name, stored, mapping, size) for name, stored in wanted.items()}

    def _read(self, name: str, stored: StoredBlocks, mapping: torch.UntypedStorage, size: int):
        kind = BLOCK_TYPES.get(stored.type_number)
        if kind is None:
            kind = _foreign_type(stored, self.path)
        count = byte_count(stored, kind, self.path, size)
        data = torch.empty(0, dtype=torch.uint8).set_(mapping[stored.place : stored.place + count])
        shape = self.shapes.get(stored.name, stored.shape)
        if kind.plain is not None:
            aligned = data if stored.place % kind.size == 0 else data.clone()
            return aligned.view(kind.plain).reshape(shape)
        packed = Packed(data, Packing(((kind, stored.shape[0]),), stored.shape[-1])) if len(stored.shape) == 2 else None
        if packed is not None and shape == stored.shape and name.endswith(_PACKED_END) and kind.name in _OWN:
            return packed
        return kind.expand(data.reshape(-1, kind.size)).reshape(shape).half()


_OWN = {kind.name for kind in BLOCK_TYPES.values()}


def open_gguf(path: Path) -> GGUFFile:
    """Describe a GGUF file. Raises ValueError naming it, for a damaged header and for tensors beyond its end."""
    header = read_header(path)
    size = path.stat().st_size
    total, content = 0, {}
    is_t5 = header.fields.get(ARCHITECTURE) in T5_ARCHITECTURES
    for name, stored in header.tensors.items():
        kind = BLOCK_TYPES.get(stored.type_number)
        if kind is not None:
            total += byte_count(stored, kind, path, size)
        renamed = hugging_face_name(name) if is_t5 or name.startswith("enc.blk.") or name in _LLAMA_NAMES else None
        if renamed is None and is_t5 and name.startswith(("dec.", "output.")):
            continue  # of the decoder
        content[renamed or name] = stored
    if total > size:
        raise ValueError(
            f"Tensors share their bytes: got {math.ceil(total / 1e6)} MB in all out of {shorten(path.name)} of "
            f"{math.ceil(size / 1e6)} MB, expected each its own. Download the file again from a source that you trust."
        )
    texts = {name: value for name, value in header.fields.items() if isinstance(value, str)}
    return GGUFFile(path, content, texts, _original_shapes(header))


def byte_count(stored: StoredBlocks, kind: BlockType, path: Path, size: int) -> int:
    """The bytes of a tensor. Raises ValueError for rows that are no whole blocks, and for a file that ends before."""
    if stored.shape[-1] % kind.count:
        raise ValueError(
            f"Damaged GGUF file: got rows of {stored.shape[-1]} numbers for {shorten(stored.name)} in "
            f"{shorten(path.name)}, expected a multiple of {kind.count} ({kind.name}). Convert the model again."
        )
    count = math.prod(stored.shape) // kind.count * kind.size
    if stored.place + count > size:
        raise ValueError(
            f"Truncated file: got {size} bytes in {shorten(path.name)}, expected at least {stored.place + count} for "
            f"{shorten(stored.name)}. Download the file again."
        )
    return count


def _foreign_type(stored: StoredBlocks, path: Path) -> BlockType:
    """A type that only the package knows, whose weights are expanded when they are read."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"Rare GGUF type: got type {stored.type_number} for {shorten(stored.name)} in {shorten(path.name)}, "
            f"expected one of {list_names([kind.name for kind in BLOCK_TYPES.values()], 20)}. Choose such a file, or "
            f"install the package: pip install gguf."
        ) from error
    try:
        kind = gguf.GGMLQuantizationType(stored.type_number)
        count, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(torch.zeros(1, size, dtype=torch.uint8).numpy(), kind)
    except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise ValueError(
            f"Unknown GGUF type: got type {stored.type_number} for {shorten(stored.name)} in {shorten(path.name)}, "
            f"expected one that gguf.quants can expand. Choose a Q4_K, Q5_K, Q6_K or Q8_0 file of the model."
        ) from error

    def expand(blocks: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind)).reshape(-1, count)

    return BlockType(kind.name, count, size, expand)


def _original_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, value in header.fields.items():
        tensor = header.tensors.get(name.removeprefix(ORIGINAL_SHAPE)) if name.startswith(ORIGINAL_SHAPE) else None
        sound = isinstance(value, list) and all(type(size) is int and size > 0 for size in value)
        if tensor is not None and sound and math.prod(value) == math.prod(tensor.shape):
            shapes[tensor.name] = tuple(value)
    return shapes
