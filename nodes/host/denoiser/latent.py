"""Latents as the host wants them."""

import comfy.model_management
import torch

from ....pixart.config import LATENT_DOWNSCALE

CHANNELS = 4


def empty_latent(height_px: int, width_px: int, batch_size: int) -> dict:
    """LATENT of zeros, (batch_size, 4, height_px / 8, width_px / 8), for any PixArt autoencoder."""
    management = comfy.model_management
    dtype = getattr(management, "intermediate_dtype", lambda: torch.float32)()
    shape = (batch_size, CHANNELS, height_px // LATENT_DOWNSCALE, width_px // LATENT_DOWNSCALE)
    samples = torch.zeros(shape, device=management.intermediate_device(), dtype=dtype)
    return {"samples": samples, "downscale_ratio_spacial": LATENT_DOWNSCALE}
