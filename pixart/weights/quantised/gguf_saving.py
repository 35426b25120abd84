"""Writes weights as GGUF, by the package `gguf`: matrices in blocks, all else as numbers."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ...files.atomic import write_atomically
from ...quoting import shorten
from .blocks import BLOCK_TYPES
from .gguf_file import llama_name

SUFFIX = ".gguf"
PIXART, T5 = "pixart", "t5encoder"
# What gguf.quants can make of numbers.
TYPES = ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
_BLOCK = {kind.name: kind.count for kind in BLOCK_TYPES.values()}
_NUMBERS = "F32"


def write_gguf(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    architecture: str,
    kind: str = "Q8_0",
    texts: Mapping[str, str] | None = None,
    numbers: Mapping[str, int | float] | None = None,
) -> None:
    """Write a model, complete or not at all. architecture: PIXART or T5, whose names become llama.cpp's.

    kind: of TYPES, for the matrices of linear layers and the table of words. texts, numbers: further fields.
    Raises ValueError for another kind, and without the package.
    """
    if kind not in TYPES:
        raise ValueError(f"Unknown GGUF type: got {shorten(kind)}, expected one of {', '.join(TYPES)}. Choose one.")
    gguf = _package()
    names = {name: (llama_name(name) or name) if architecture == T5 else name for name in weights}
    kinds = {name: _kind_of(name, tensor, kind) for name, tensor in weights.items()}

    numbers_type = torch.empty(0, dtype=torch.float32).numpy().dtype  # with it the shape is that of the numbers

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, architecture)
        for field, text in (texts or {}).items():
            writer.add_string(field, text)
        for field, number in (numbers or {}).items():
            add = writer.add_uint32 if isinstance(number, int) else writer.add_float32
            add(f"{architecture}.{field}", number)
        for name, tensor in weights.items():
            stored = gguf.GGMLQuantizationType[kinds[name]]
            count, size = gguf.GGML_QUANT_SIZES[stored]
            writer.add_tensor_info(
                names[name], list(tensor.shape), numbers_type, tensor.numel() // count * size, raw_dtype=stored
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in weights.items():
            stored = gguf.GGMLQuantizationType[kinds[name]]
            writer.write_tensor_data(gguf.quants.quantize(tensor.float().contiguous().cpu().numpy(), stored))
        writer.close()

    write_atomically(path, write)


def _kind_of(name: str, tensor: torch.Tensor, kind: str) -> str:
    """The type of one tensor: blocks for matrices whose rows are whole blocks, else numbers."""
    is_matrix = tensor.ndim == 2 and name.endswith(".weight") and "relative_attention_bias" not in name
    if not is_matrix:
        return _NUMBERS
    return kind if tensor.shape[-1] % _BLOCK[kind] == 0 else "F16"


def _package():
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "GGUF cannot be written: got no package gguf, expected it. Install it with: pip install gguf."
        ) from error
    return gguf


def t5_fields(sizes: Mapping[str, int]) -> dict[str, int | float]:
    """What llama.cpp asks of a T5 encoder's file. sizes: see `t5.CONFIG_FIELDS`."""
    return {
        "context_length": 512,
        "embedding_length": sizes["d_model"],
        "feed_forward_length": sizes["d_ff"],
        "block_count": sizes["num_layers"],
        "attention.head_count": sizes["num_heads"],
        "attention.key_length": sizes["d_kv"],
        "attention.value_length": sizes["d_kv"],
        "attention.layer_norm_epsilon": 1e-6,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.relative_buckets_count": 32,
        "vocab_size": sizes["vocab_size"],
    }
