"""PixArt's first stage: a PixArt out of a DiT that was trained on ImageNet's classes.

At t = 500 and the class that stands for none every block, and the last layer, computes what the DiT's does; captions
begin without effect. At other timesteps the blocks differ from the DiT's by what their modulations differ from the mean
of all. Source: PixArt-alpha, arXiv 2310.00426, section 2.3 (adaLN-single, re-parameterization); DiT, arXiv 2212.09748.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import ALPHA, ALPHA_CAPTION_LENGTH, CONFIGS, PixArtConfig
from ..layers import position_grid, sinusoid
from ..quoting import shorten
from ..weights.detection import Detection, guess_heads, mlp_ratio
from ..weights.folders import read_json
from ..weights.layouts import NULL_CAPTION_KEY, RECOMPUTED_KEYS, Weights, describe
from ..weights.quantised.packed import expand_all
from ..weights.reading import Checkpoint, finish_checkpoint, naming, open_weights
from ..weights.wrappers import EMA, identify
from .records import with_stage

ANCHOR = 500.0  # the timestep at which nothing changes
T5_XXL_CHANNELS = 4096
_FOREIGN = "expected a DiT in the original's or in diffusers' layout (DiT-XL-2-256x256.pt, facebook/DiT-XL-2-256)"
_POSITION_SLACK = 1e-2  # of sines and cosines, which a file may hold in half precision
# DiT's name -> diffusers' names, whose rows make it up; in a block, and around the blocks.
_BLOCK_PARTS = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "t_embedder.mlp.0": ("norm1.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("norm1.emb.timestep_embedder.linear_2",),
}
_OUTER_PARTS = {
    "x_embedder.proj": ("pos_embed.proj",),
    "final_layer.adaLN_modulation.1": ("proj_out_1",),
    "final_layer.linear": ("proj_out_2",),
}
_TABLE, _CLASSES = "y_embedder.embedding_table.weight", "norm1.emb.class_embedder.embedding_table.weight"
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.(.+)")


def read_dit(
    path: str | os.PathLike,
    *,
    weights: str = EMA,
    seed: int = 0,
    caption_channels: int = T5_XXL_CHANNELS,
    caption_length: int = ALPHA_CAPTION_LENGTH,
) -> Checkpoint:
    """A PixArt out of a DiT's file (.pt, safetensors, a training's checkpoint) or diffusers folder.

    weights: "ema" or "model", of a training's checkpoint. seed: of what a DiT does not have, the parts that read
    captions. caption_channels, caption_length: of the text encoder's states.
    Raises FileNotFoundError, and ValueError naming the file: for another kind of model, a DiT whose tensors are not
    complete, and one with learned positions.
    """
    path = Path(path)
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    with naming(path):
        opened = open_weights(folder)
        found = identify(opened.content, weights, opened.metadata)
        _require_dit(found)
        tensors = expand_all(opened.read(found.tensors))
        declared = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        state, config = start_from_dit(
            tensors, declared, seed=seed, caption_channels=caption_channels, caption_length=caption_length
        )
        stages = with_stage({}, f"started from {path.name}")
        checkpoint = finish_checkpoint(path, Weights(state, "original", stages, found.place), _detection(config))
    return checkpoint


def start_from_dit(
    tensors: Mapping[str, Tensor],
    declared: Mapping | None = None,
    *,
    seed: int = 0,
    caption_channels: int = T5_XXL_CHANNELS,
    caption_length: int = ALPHA_CAPTION_LENGTH,
) -> tuple[dict[str, Tensor], PixArtConfig]:
    """(state dict of a PixArt, its configuration) out of a DiT's tensors, in either layout.

    declared: diffusers' config.json, which tells the number of heads. See `read_dit`.
    """
    dit = _plain_names(tensors)
    config = _config_of(dit, declared or {}, caption_channels, caption_length)
    _check(dit, config)
    kept = ["x_embedder.proj", "final_layer.linear"]
    kept += [f"blocks.{index}.{part}" for index in range(config.depth) for part in _KEPT]
    state = {name: dit[name] for layer in kept for name in (f"{layer}.weight", f"{layer}.bias")}
    state |= _modulation(dit, config)
    state |= _caption_parts(config, torch.Generator().manual_seed(seed), dit["x_embedder.proj.weight"].dtype)
    return state, config


_KEPT = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def is_dit(found: Weights) -> bool:
    """Whether weights are a DiT's, by their names."""
    return _TABLE in found.tensors or f"transformer_blocks.0.{_CLASSES}" in found.tensors


def is_dit_folder(folder: Path) -> bool:
    """Whether a transformer's folder says that it is a DiT's, or holds the weights of one."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("norm_type") == "ada_norm_zero"


def _require_dit(found: Weights) -> None:
    if is_dit(found):
        return
    raise ValueError(
        f"Not a DiT: got {describe(found.layout)}, {_FOREIGN}. Choose a DiT's file; a PixArt needs no such start."
    )


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the original's names. Each block of diffusers' has embedders of its own: they are named after it.

    Raises ValueError naming what is unknown or missing.
    """
    if _TABLE in tensors:
        return dict(tensors)
    left, plain = dict(tensors), {}
    blocks = {match[1] for name in tensors if (match := re.fullmatch(r"transformer_blocks\.(\d{1,4})\..+", name))}
    for index in blocks:
        start = f"transformer_blocks.{index}."
        plain[f"blocks.{index}.{_TABLE}"] = _take(left, [f"{start}{_CLASSES}"])
        plain |= _joined(left, _BLOCK_PARTS, start, f"blocks.{index}.")
    plain |= _joined(left, _OUTER_PARTS, "", "")
    for name in RECOMPUTED_KEYS:
        if name in left:
            plain["pos_embed"] = left.pop(name)
    _refuse_unknown(left)
    return plain


def _joined(left: dict, parts: Mapping, source: str, target: str) -> dict[str, Tensor]:
    return {
        f"{target}{name}.{kind}": _take(left, [f"{source}{part}.{kind}" for part in names])
        for name, names in parts.items()
        for kind in ("weight", "bias")
    }


def _take(left: dict, names: list[str]) -> Tensor:
    for name in names:
        if name not in left:
            raise ValueError(f"Weights are missing: got no {shorten(name)}, {_FOREIGN}. Download the file again.")
    tensors = [left.pop(name) for name in names]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _refuse_unknown(names) -> None:
    for name in names:
        raise ValueError(
            f"Unknown weights: got {shorten(name)} in what looks like a DiT, {_FOREIGN}. Choose another file."
        )


def _config_of(dit: Mapping, declared: Mapping, caption_channels: int, caption_length: int) -> PixArtConfig:
    """What the shapes say; the heads by config.json, or as the published sizes have them."""
    blocks = {int(match[1]) for match in map(_BLOCK.fullmatch, dit) if match}
    proj, linear, inner = (_shape(dit, name) for name in _SIZED)
    missing = [name for name in _SIZED if name not in dit] or sorted(set(range(len(blocks))) - blocks)
    if missing or len(proj) != 4 or len(linear) != 2 or len(inner) != 2 or proj[2] != proj[3]:
        raise ValueError(
            f"Not a whole DiT: got no {shorten(missing[0])}, {_FOREIGN}. Download the file again."
            if missing
            else f"Not a DiT: got embedding and last layer of shapes {proj} and {linear}, {_FOREIGN}. Choose another."
        )
    width, channels, patch = proj[0], proj[1], proj[2]
    outputs = linear[0] // patch**2
    side = _side(dit, declared, patch)
    heads = declared.get("num_attention_heads")
    return PixArtConfig(
        depth=len(blocks),
        hidden_size=width,
        num_heads=heads if type(heads) is int and 0 < heads <= width else guess_heads(width),
        patch_size=patch,
        in_channels=channels,
        mlp_ratio=mlp_ratio(inner[0], width),
        caption_channels=caption_channels,
        caption_length=caption_length,
        learn_sigma=outputs == 2 * channels,
        micro_condition=False,
        base_size=side,
        pe_scale=1.0,
    )


_SIZED = ("x_embedder.proj.weight", "final_layer.linear.weight", "blocks.0.mlp.fc1.weight")


def _shape(dit: Mapping, name: str) -> tuple[int, ...]:
    return tuple(dit[name].shape) if name in dit else ()


def _side(dit: Mapping, declared: Mapping, patch: int) -> int:
    """Tokens per side: of the stored positions, by config.json, or as the 256 px models have it."""
    if "pos_embed" in dit:
        return math.isqrt(dit["pos_embed"].shape[-2])
    size = declared.get("sample_size")
    return size // patch if type(size) is int and 0 < size <= 2**14 else 32 // patch


def _check(dit: Mapping[str, Tensor], config: PixArtConfig) -> None:
    """Raises ValueError for missing, unknown and misshapen tensors, and for positions that PixArt does not compute."""
    expected = _expected(config, "t_embedder.mlp.0.weight" not in dit)
    _refuse_unknown(
        name for name in dit if name not in expected and name not in RECOMPUTED_KEYS and not name.endswith(_TABLE)
    )
    for name, shape in expected.items():
        if _shape(dit, name) != shape:
            raise ValueError(
                f"Wrong shape of {shorten(name)}: got {_shape(dit, name) or 'no such tensor'}, expected {shape} in a "
                f"DiT of {config.depth} blocks. Download the file again."
            )
    stored = dit.get("pos_embed")
    if stored is not None:
        side = config.base_size
        grid = position_grid(side, side, config.hidden_size, side, 1.0).to(torch.float32)
        if stored.shape != grid.shape or (stored.float() - grid).abs().max() > _POSITION_SLACK:
            raise ValueError(
                "Other positions than a DiT's: got a table that is not the sines and cosines of a square grid, "
                "expected those, which PixArt computes for every size. Choose a DiT with fixed positions."
            )


def _expected(config: PixArtConfig, is_apart: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of a DiT but the table of classes, with its shape. is_apart: each block has its own embedders."""
    width, inner, features = config.hidden_size, int(config.hidden_size * config.mlp_ratio), 256
    embedder = {"t_embedder.mlp.0": (width, features), "t_embedder.mlp.2": (width, width)}
    shapes = {} if is_apart else dict(embedder)
    shapes["x_embedder.proj"] = (width, config.in_channels, config.patch_size, config.patch_size)
    shapes["final_layer.adaLN_modulation.1"] = (2 * width, width)
    shapes["final_layer.linear"] = (config.patch_size**2 * config.out_channels, width)
    for index in range(config.depth):
        block = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (inner, width)}
        block |= {"mlp.fc2": (width, inner), "adaLN_modulation.1": (6 * width, width)}
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in (block | embedder if is_apart else block).items()}
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in shapes.items()}


def _modulation(dit: Mapping[str, Tensor], config: PixArtConfig) -> dict[str, Tensor]:
    """The timestep's embedder, the modulation that all blocks share, and what each adds to it.

    The class that stands for none goes into the embedder's bias. What is shared is the mean of the DiT's modulations,
    the nearest to all of them at every timestep; each block's table is what it lacks at t = 500.
    """
    first = "" if "t_embedder.mlp.0.weight" in dit else "blocks.0."
    dtype = dit["x_embedder.proj.weight"].dtype
    embedder = {
        name: dit[f"{first}{name}"] for part in (0, 2) for name in (f"t_embedder.mlp.{part}.{k}" for k in _KINDS)
    }
    embedder["t_embedder.mlp.2.bias"] = embedder["t_embedder.mlp.2.bias"].double() + _no_class(dit, first)
    layers = [[dit[f"blocks.{i}.adaLN_modulation.1.{kind}"] for kind in _KINDS] for i in range(config.depth)]
    shared = [sum(tensor.double() for tensor in tensors) / config.depth for tensors in zip(*layers, strict=True)]
    condition = _condition(dit, first)
    common = F.linear(F.silu(condition), *shared)
    made = {f"t_block.1.{kind}": tensor for kind, tensor in zip(_KINDS, shared, strict=True)}
    for index, layer in enumerate(layers):
        own = _condition(dit, f"blocks.{index}." if first else "")
        rows = F.linear(F.silu(own), *(tensor.double() for tensor in layer)) - common
        made[f"blocks.{index}.scale_shift_table"] = rows.unflatten(0, (6, -1))
    last = (dit[f"final_layer.adaLN_modulation.1.{kind}"].double() for kind in _KINDS)
    made["final_layer.scale_shift_table"] = F.linear(F.silu(condition), *last).unflatten(0, (2, -1)) - condition
    return {name: tensor.to(dtype) for name, tensor in (embedder | made).items()}


_KINDS = ("weight", "bias")


def _no_class(dit: Mapping[str, Tensor], start: str) -> Tensor:
    """The embedding of the class that stands for none, (D,): the last of the table."""
    return dit[f"{start}{_TABLE}"][-1].double()


def _condition(dit: Mapping[str, Tensor], start: str) -> Tensor:
    """What a DiT's modulations are made of at t = 500 without a class: (D,) float64."""
    layers = [[dit[f"{start}t_embedder.mlp.{part}.{kind}"].double() for kind in _KINDS] for part in (0, 2)]
    features = sinusoid(torch.tensor([ANCHOR], dtype=torch.float64))[0]
    return F.linear(F.silu(F.linear(features, *layers[0])), *layers[1]) + _no_class(dit, start)


def _caption_parts(config: PixArtConfig, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """What reads captions, as PixArt's training begins: nothing of it comes out of the cross-attentions."""
    width, channels = config.hidden_size, config.caption_channels

    def normal(*shape, std=0.02):
        return torch.randn(shape, generator=generator) * std

    def xavier(rows):
        return (torch.rand(rows, width, generator=generator) * 2 - 1) * math.sqrt(6 / (rows + width))

    weights = {"y_embedder.y_proj.fc1": normal(width, channels), "y_embedder.y_proj.fc2": normal(width, width)}
    for index in range(config.depth):
        block = f"blocks.{index}.cross_attn"
        weights |= {f"{block}.q_linear": xavier(width), f"{block}.kv_linear": xavier(2 * width)}
        weights[f"{block}.proj"] = torch.zeros(width, width)
    made = {f"{name}.weight": weight for name, weight in weights.items()}
    made |= {f"{name}.bias": torch.zeros(len(weight)) for name, weight in weights.items()}
    made[NULL_CAPTION_KEY] = normal(config.caption_length, channels, std=channels**-0.5)
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def _detection(config: PixArtConfig) -> Detection:
    row = f"{ALPHA}-{config.base_px}"
    signs = {"family": "its start from a DiT", "base_size": "positions of the DiT", "num_heads": "the DiT's width"}
    return Detection(config, "DiT", ALPHA, row if row in CONFIGS else None, signs)
