"""Make pictures with the demo model alone, without ComfyUI: what evaluation needs."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

from ..pixart.config import PixArtConfig
from ..pixart.controlnet import PixArtControlNet
from ..pixart.transformer import PixArt
from ..samplers import SAMPLERS
from ..samplers.schedules import schedule_sigmas, timesteps_from_sigmas
from .autoencoder import Autoencoder
from .text import encode_text, make_text_batch

GUIDANCE = 2.0  # at which outlines are best: more of it exaggerates what tells one shape from another


@dataclass
class DemoModel:
    """The three trained parts and the tokenizer, in float32."""

    denoiser: PixArt
    text: T5EncoderModel
    autoencoder: Autoencoder
    tokenizer: PreTrainedTokenizerBase


def read_metadata(path: Path, key: str) -> dict:
    """A JSON entry of a safetensors file's metadata. Raises ValueError when it is not there."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if key not in metadata:
        raise ValueError(
            f"Metadata missing in {path}: got {list(metadata)}, expected {key!r}. Train and export it again."
        )
    return json.loads(metadata[key])


def load_denoiser(path: Path) -> PixArt:
    """The denoiser of a shipped file, in float32."""
    model = PixArt(PixArtConfig(**read_metadata(path, "pixart_config")))
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


def load_text_encoder(path: Path) -> T5EncoderModel:
    """The text encoder of a shipped file, in float32."""
    model = T5EncoderModel(T5Config(**read_metadata(path, "t5_config")))
    state = {key: value.float() for key, value in load_file(path).items()}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def load_autoencoder(path: Path) -> Autoencoder:
    """The autoencoder of a shipped file, in float32."""
    model = Autoencoder()
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


@dataclass
class Steering:
    """A ControlNet over the demo's denoiser, and the pictures to follow: hints (B, 3, H, W) in [0, 1]."""

    control: PixArtControlNet
    hints: Tensor


def _denoised(
    model: DemoModel, captions: list[str], height_px: int, width_px: int, guidance: float, steering: Steering | None
):
    """The function (x, sigma) -> denoised that samplers call: both captions of every picture in one forward."""
    text = make_text_batch([*captions, *[""] * len(captions)], model.tokenizer)
    states = encode_text(model.text, text)
    size = torch.tensor([[height_px, width_px]], dtype=torch.float32)
    ratio = size[:, :1] / size[:, 1:]
    hints = None if steering is None else model.autoencoder.encode(steering.hints).repeat(2, 1, 1, 1)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        timestep = timesteps_from_sigmas(sigma).float()
        level = sigma.reshape(-1, 1, 1, 1)
        noisy = x / (1 + level.square()).sqrt()
        both = torch.cat([noisy, noisy]), torch.cat([timestep, timestep])
        residuals = None if steering is None else steering.control.attach(model.denoiser, hints)
        prediction = model.denoiser(*both, states, text.kept, size, ratio, control=residuals)
        told, untold = prediction[:, : x.shape[1]].chunk(2)
        return x - level * (untold + guidance * (told - untold))

    return denoise


@torch.no_grad()
def generate(
    model: DemoModel,
    captions: list[str],
    *,
    height_px: int = 128,
    width_px: int = 128,
    steps: int = 20,
    guidance: float = GUIDANCE,
    seed: int = 0,
    sampler: str = "dpm_solver",
    schedule: str = "uniform",
    steering: Steering | None = None,
) -> np.ndarray:
    """One picture per caption: (B, height_px, width_px, 3) uint8. steering: what they are to follow, one hint each."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(captions), 4, height_px // 8, width_px // 8, generator=generator)
    levels = schedule_sigmas(schedule, steps)
    denoise = _denoised(model, captions, height_px, width_px, guidance, steering)
    latents = SAMPLERS[sampler](denoise, noise * float((1 + levels[0] ** 2).sqrt()), levels, disable=True)
    pictures = model.autoencoder.decode(latents)
    return (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
