"""Latents as the host wants them."""

import comfy.latent_formats
import comfy.model_management
import torch

from ....pixart.config import LATENT_DOWNSCALE, PixArtConfig

CHANNELS = 4
DEMO_CAPTION_CHANNELS = 64  # no released PixArt has a text encoder this narrow


class DemoLatents(comfy.latent_formats.SD15):
    """Latents of the demo's autoencoder: SD 1.5's scale, and colours of their own in previews while sampling."""

    def __init__(self):
        super().__init__()
        # Written by `python dev.py run -m pixart_pack.demo.preview`.
        self.latent_rgb_factors = [
            (0.5999, 0.5999, 0.5999),
            (0.2799, 0.0, -0.2799),
            (-0.1333, 0.2666, -0.1333),
            (0.0, 0.0, 0.0),
        ]
        self.latent_rgb_factors_bias = (0.1597, 0.0198, -0.0002)
        self.taesd_decoder_name = None  # it would draw other colours


def latent_format(config: PixArtConfig) -> type[comfy.latent_formats.LatentFormat]:
    """The latents of a model: SDXL's for Sigma, SD 1.5's for alpha, the demo's for it and what was trained from it."""
    if config.is_sigma:
        return comfy.latent_formats.SDXL
    return DemoLatents if config.caption_channels == DEMO_CAPTION_CHANNELS else comfy.latent_formats.SD15


def empty_latent(height_px: int, width_px: int, batch_size: int) -> dict:
    """LATENT of zeros, (batch_size, 4, height_px / 8, width_px / 8), for any PixArt autoencoder."""
    management = comfy.model_management
    dtype = getattr(management, "intermediate_dtype", lambda: torch.float32)()
    shape = (batch_size, CHANNELS, height_px // LATENT_DOWNSCALE, width_px // LATENT_DOWNSCALE)
    samples = torch.zeros(shape, device=management.intermediate_device(), dtype=dtype)
    return {"samples": samples, "downscale_ratio_spacial": LATENT_DOWNSCALE}
