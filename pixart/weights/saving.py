"""Writes PixArt weights: one file or a diffusers folder, complete or not at all; `reading.py` reads them."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..config import PixArtConfig
from ..files.atomic import dump, write_atomically, write_folder_atomically
from ..quoting import shorten
from .checking import check_weights
from .layouts import CONFIG_KEY
from .wrappers import to_diffusers, to_original

# Precisions by the names that settings, commands and nodes give them.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")


def save_checkpoint(
    path: str | os.PathLike,
    state_dict: Mapping[str, torch.Tensor],
    config: PixArtConfig,
    layout: str = "original",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Write a model: `.safetensors`, `.pth` ({'state_dict': ...}), or a diffusers folder when path has neither ending.

    layout: "original" or "diffusers"; a folder is always diffusers, in `path/transformer`. dtype: None keeps each.
    metadata: texts that are kept with the weights; the configuration is always added to them.
    shard_bytes: the largest file of a folder; None writes one.
    The file appears complete or not at all; an existing file is replaced, a folder with content is not.
    Raises ValueError for weights that are no PixArt, another layout, or a folder that is not empty.
    """
    path = Path(path)
    if layout not in ("original", "diffusers"):
        raise ValueError(
            f"Unknown layout: got {shorten(layout)}, expected 'original' or 'diffusers'. Choose one of them."
        )
    texts = {str(key): str(value) for key, value in (metadata or {}).items()}
    texts |= {"format": "pt", CONFIG_KEY: json.dumps(asdict(config))}
    weights = to_original(state_dict)
    check_weights(weights, config)
    is_file = names_file(path)
    if layout == "diffusers" or not is_file:
        weights = to_diffusers(weights, keep_null_caption=is_file)
    if is_file:
        write_weights(path, weights, texts, dtype)
    else:
        _save_folder(path, _ready_to_write(weights, dtype, False), config, texts, shard_bytes)


def names_file(path: Path) -> bool:
    """Whether weights saved under this name are one file; a folder otherwise."""
    return path.suffix in (".safetensors", *_TORCH_SUFFIXES)


def write_weights(
    path: Path, weights: Mapping[str, torch.Tensor], texts: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Write tensors and texts to one file, `.safetensors` or `.pth` ({'state_dict': ...}), complete or not at all."""
    is_torch = path.suffix in _TORCH_SUFFIXES
    ready = _ready_to_write(weights, dtype, is_torch)
    if is_torch:
        write_atomically(path, lambda temporary: dump({"state_dict": ready, "metadata": texts}, temporary))
    else:
        write_atomically(path, lambda temporary: save_file(ready, temporary, metadata=texts))


def diffusers_config(config: PixArtConfig) -> dict:
    """The content of a diffusers config.json. Source: diffusers, PixArtTransformer2DModel.

    As in the published folders, alpha's leaves null what diffusers' own defaults say and Sigma's spells it out, which
    is the only sign of their families where the weights went through diffusers.
    """
    sample_size = config.base_size * config.patch_size
    scale = int(config.pe_scale) if config.pe_scale == int(config.pe_scale) else config.pe_scale
    is_default = {"scale": scale == max(sample_size // 64, 1), "extra": config.micro_condition == (sample_size == 128)}
    return {
        "_class_name": "PixArtTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "attention_type": "default",
        "caption_channels": config.caption_channels,
        "cross_attention_dim": config.hidden_size,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "interpolation_scale": None if is_default["scale"] and not config.is_sigma else scale,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_single",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": sample_size,
        "upcast_attention": False,
        "use_additional_conditions": None if is_default["extra"] and not config.is_sigma else config.micro_condition,
    }


def lost_in_diffusers(config: PixArtConfig) -> tuple[str, ...]:
    """What diffusers' PixArtTransformer2DModel would drop of such a model, or refuse, in words."""
    facts = {
        "it has no qk norm, and would leave its weights out: other pictures": config.qk_norm,
        "it has no key and value compression, and would leave its weights out: other pictures": (
            config.kv_compress_ratio > 1 and bool(config.kv_compress_layers)
        ),
        f"it takes an MLP ratio of 4 alone, and would refuse {config.mlp_ratio:g}": config.mlp_ratio != 4,
    }
    return tuple(f"diffusers' own class cannot run this model: {text}" for text, is_so in facts.items() if is_so)


def _ready_to_write(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None, whole: bool) -> dict:
    """Contiguous CPU tensors of `dtype`, none of them the same memory as another.

    whole: none is a part of a larger memory either, which torch.save would write in full.
    """
    ready, places = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
        is_part = whole and tensor.untyped_storage().nbytes() != tensor.nbytes
        ready[name] = tensor.clone() if is_part or tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    return ready


def _save_folder(path: Path, tensors: dict, config: PixArtConfig, texts: dict, shard_bytes: int | None) -> None:
    def fill(folder: Path) -> None:
        _write_shards(folder, tensors, texts, shard_bytes)
        (folder / "config.json").write_text(json.dumps(diffusers_config(config), indent=2) + "\n", encoding="utf-8")

    write_folder_atomically(path / "transformer", fill)


def _write_shards(folder: Path, tensors: dict, texts: dict, shard_bytes: int | None) -> None:
    shards: list[dict] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shard_bytes and shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    stem = "diffusion_pytorch_model"
    if len(shards) == 1:
        write_atomically(folder / f"{stem}.safetensors", lambda file: save_file(tensors, file, metadata=texts))
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_atomically(folder / name, lambda file, shard=shard: save_file(shard, file, metadata=texts))
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
