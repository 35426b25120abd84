"""A tiny PixArt with random weights, whose caption width is that of the tiny T5."""

from dataclasses import replace

import torch

from pixart_pack.pixart.config import CONFIGS, PixArtConfig
from pixart_pack.pixart.transformer import PixArt
from pixart_pack.tests.tiny_t5 import SIZES

TINY = {"depth": 3, "hidden_size": 48, "num_heads": 4, "caption_channels": SIZES["d_model"]}


def tiny_config(variant: str = "alpha-1024", **fields) -> PixArtConfig:
    """A released variant, made tiny."""
    return replace(CONFIGS[variant], **{**TINY, **fields})


def make_weights(config: PixArtConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict in the original layout in which every path counts, and whose predictions stay near unit size."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in PixArt(config, device="meta").state_dict().items()}
    return {name: torch.randn(shape, generator=generator) * 0.08 for name, shape in shapes.items()}


def make_model(config: PixArtConfig, seed: int = 0) -> PixArt:
    """The model itself, outside any host, in float32."""
    model = PixArt(config).eval()
    model.load_state_dict(make_weights(config, seed))
    return model
