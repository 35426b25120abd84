"""DDIM, with eta from 0 (deterministic) to 1 (as much noise as DDPM). Source: arXiv 2010.02502, equation 16."""

import math

from .contract import Denoiser, check_sigmas, steps
from .noise import noise_source


def sample_ddim(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    noise_sampler=None,
    eta=0.0,
    clip_denoised=False,
    noise_device="cpu",
):
    """Step along the noise that the model predicts, replacing a part of it by fresh noise.

    model(x, sigma, **extra_args) -> denoised. x: (B, C, H, W), variance exploding. sigmas: descending, >= 2 values.
    eta: 0 to 1. clip_denoised: limit the denoised latent to [-1, 1]. noise_sampler and noise_device: see sa_solver.
    Returns the latent at the last sigma.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"DDIM eta is out of range: got {eta}, expected 0 to 1. Set eta to 0.")
    levels = check_sigmas(sigmas)
    draw = noise_source(x, noise_sampler, extra_args, noise_device)
    denoise = Denoiser(model, levels, extra_args, callback)
    for i in steps(levels, disable):
        denoised = denoise(x, i)
        denoised = denoised.clamp(-1.0, 1.0) if clip_denoised else denoised
        source, target = levels[i : i + 2]
        fresh = eta * target * math.sqrt(1.0 - (target / source) ** 2)
        x = denoised + (math.sqrt(target**2 - fresh**2) / source) * (x - denoised)
        if fresh > 0.0:
            x = x + fresh * draw(source, target)
    return x
