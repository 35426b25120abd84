"""PixArt's later stages: a model that goes on at another size, or as the other family, from what it has learned.

A grown model that is not trained yet predicts what it predicted: positions span what they spanned, the size's embedder
begins without effect, or leaves what it added at the trained size. Two things cannot be kept, and training has to mend
them: released configurations that stretch the positions, and compressed keys and values, which begin as averages.
Source: PixArt-alpha, arXiv 2310.00426, section 2.3 and table 2; PixArt-Sigma, arXiv 2403.04692, section 3.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..config import CONFIGS, LATENT_DOWNSCALE, PixArtConfig
from ..layers import ScalarEmbedder
from ..quoting import shorten
from ..weights.checking import FREQUENCY_CHANNELS
from ..weights.layouts import NULL_CAPTION_KEY
from ..weights.reading import Checkpoint
from .records import with_stage

COMPRESSED = "-kvcompress"  # behind a variant of Sigma
COMPRESSION_RATIO = 2
RELEASED = tuple(CONFIGS)
GROWTHS = (*RELEASED, f"sigma-1024{COMPRESSED}", f"sigma-2048{COMPRESSED}")
SMALLEST_PX, LARGEST_PX = 64, 8192
_EMBEDDERS = ("csize_embedder", "ar_embedder")


def grow_checkpoint(checkpoint: Checkpoint, growth: str, seed: int = 0) -> Checkpoint:
    """A checkpoint grown to `growth`, see `grown_config`, which its metadata then says. The given one is emptied."""
    config = grown_config(checkpoint.config, growth)
    state = grow(checkpoint.state_dict, checkpoint.config, config, seed)
    line = f"grown from {describe(checkpoint.config)} to {describe(config)} ({growth})"
    signs = {**checkpoint.detection.signs, "base_size": "its growth", "family": "its growth"}
    family = "sigma" if config.is_sigma else "alpha"
    row = f"{family}-{config.base_px}"
    variant = row if row in CONFIGS else None
    detection = replace(checkpoint.detection, config=config, family=family, variant=variant, signs=signs)
    return replace(checkpoint, state_dict=state, detection=detection, metadata=with_stage(checkpoint.metadata, line))


def grown_config(config: PixArtConfig, growth: str) -> PixArtConfig:
    """The configuration after a stage.

    growth: of GROWTHS, which takes what the released model has (size, position scale, size conditions, tokens,
    autoencoder; with "-kvcompress" the keys and values of the deeper half compressed); or a side in pixels, such as
    "512", which stretches the positions so that they span what they spanned.
    Raises ValueError for anything else.
    """
    growth = str(growth).strip()
    unit = LATENT_DOWNSCALE * config.patch_size
    if re.fullmatch(r"[0-9]{2,5}", growth):
        side = int(growth)
        if not SMALLEST_PX <= side <= LARGEST_PX or side % unit:
            raise ValueError(
                f"Size out of range: got {side} px, expected a multiple of {unit} from {SMALLEST_PX} to {LARGEST_PX}. "
                f"Choose another one."
            )
        return replace(config, base_size=side // unit, pe_scale=config.pe_scale * side / config.base_px)
    if growth not in GROWTHS:
        raise ValueError(
            f"Unknown growth: got {shorten(growth)}, expected a side in pixels or one of {', '.join(GROWTHS)}. Choose "
            f"one of them."
        )
    row = CONFIGS[growth.removesuffix(COMPRESSED)]
    fields = {name: getattr(row, name) for name in ("pe_scale", "micro_condition", "caption_length", "vae_scale")}
    if growth.endswith(COMPRESSED):
        fields["kv_compress_ratio"] = COMPRESSION_RATIO
        fields["kv_compress_layers"] = tuple(range(config.depth // 2, config.depth))
    return replace(config, base_size=row.base_px // unit, **fields)


def describe(config: PixArtConfig) -> str:
    """A stage in few words, such as "alpha at 512 px"."""
    return f"{'Sigma' if config.is_sigma else 'alpha'} at {config.base_px} px"


@torch.no_grad()
def grow(state: Mapping[str, Tensor], old: PixArtConfig, new: PixArtConfig, seed: int = 0) -> dict[str, Tensor]:
    """The weights for the new configuration, in the dtype of the old ones; unchanged ones are the same tensors.

    old, new: differ in size, position scale, size conditions, caption length, autoencoder and compression alone.
    seed: of rows and layers that begin by chance.
    """
    generator = torch.Generator().manual_seed(seed)
    grown = dict(state)
    if new.micro_condition and not old.micro_condition:
        grown |= _silent_embedders(new, generator, state["t_embedder.mlp.0.weight"].dtype)
    if old.micro_condition and not new.micro_condition:
        _fold_size(grown, old)
    if NULL_CAPTION_KEY in grown:
        grown[NULL_CAPTION_KEY] = _caption_rows(grown[NULL_CAPTION_KEY], new.caption_length, generator)
    grown |= _averages(state, old, new)
    return grown


def _silent_embedders(config: PixArtConfig, generator, dtype) -> dict[str, Tensor]:
    """Embedders of the picture's size whose last layer is zero: nothing is added to the timestep until it learns."""
    third, made = config.hidden_size // 3, {}
    for name in _EMBEDDERS:
        made[f"{name}.mlp.0.weight"] = torch.randn(third, FREQUENCY_CHANNELS, generator=generator) * 0.02
        made[f"{name}.mlp.2.weight"] = torch.zeros(third, third)
        made |= {f"{name}.mlp.{part}.bias": torch.zeros(third) for part in (0, 2)}
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def _fold_size(state: dict[str, Tensor], config: PixArtConfig) -> None:
    """Take the size's embedders out; what they added at the trained size goes into the timestep's."""
    third, added = config.hidden_size // 3, []
    for name, values in zip(_EMBEDDERS, ([float(config.base_px)] * 2, [1.0]), strict=True):
        embedder = ScalarEmbedder(third)
        own = [key for key in state if key.startswith(f"{name}.")]
        embedder.load_state_dict({key.removeprefix(f"{name}."): state.pop(key).float() for key in own})
        added.append(embedder(torch.tensor([values]), torch.float32)[0])
    bias = state["t_embedder.mlp.2.bias"]
    state["t_embedder.mlp.2.bias"] = (bias.float() + torch.cat(added)).to(bias.dtype)


def _caption_rows(null: Tensor, length: int, generator) -> Tensor:
    """The null caption of another length. Rows begin by chance, as the original's do, and are never trained."""
    if length <= len(null):
        return null[:length]
    rows = torch.randn(length - len(null), null.shape[1], generator=generator) / math.sqrt(null.shape[1])
    return torch.cat([null, rows.to(null.dtype)])


def _averages(state: Mapping[str, Tensor], old: PixArtConfig, new: PixArtConfig) -> dict[str, Tensor]:
    """Convolutions that average keys and values, and their norms, for the blocks that are compressed from now on."""
    made, width, ratio = {}, new.hidden_size, new.kv_compress_ratio
    before = old.kv_compress_layers if old.kv_compress_ratio > 1 else ()
    for index in new.kv_compress_layers if ratio > 1 else ():
        like = state[f"blocks.{index}.attn.qkv.weight"]
        block = {"sr.weight": torch.full((width, 1, ratio, ratio), ratio**-2), "sr.bias": torch.zeros(width)}
        block |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
        if index not in before:
            made |= {f"blocks.{index}.attn.{name}": tensor.to(like.dtype) for name, tensor in block.items()}
    return made
