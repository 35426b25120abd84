"""DDIM, with eta from 0 (deterministic) to 1 (as much noise as DDPM). Source: arXiv 2010.02502, equation 16."""

import math

from .contract import Denoiser, check_sigmas, steps
from .noise import noise_source
from .schedules import sigmas as noise_levels
from .schedules import timesteps_from_sigmas


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
    conventions=None,
    stride=None,
):
    """Step along the noise that the model predicts, replacing a part of it by fresh noise.

    model(x, sigma, **extra_args) -> denoised. x: (B, C, H, W), variance exploding. sigmas: descending, >= 2 values.
    eta: 0 to 1. clip_denoised: limit the denoised latent to [-1, 1]. noise_sampler and noise_device: see sa_solver.
    conventions: limits and times of diffusers' schedulers (Conventions); there the noise of a step is the model's own
        whatever limits its picture, where eta is below 1. stride: how many timesteps a step goes back, as their DDIM
        counts it; the next one starts from there at its own time. None: each step ends where the next one starts.
    Returns the latent at the last sigma.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"DDIM eta is out of range: got {eta}, expected 0 to 1. Set eta to 0.")
    levels = check_sigmas(sigmas)
    draw = noise_source(x, noise_sampler, extra_args, noise_device)
    denoise = Denoiser(model, levels, extra_args, callback, conventions)
    for i in steps(levels, disable):
        denoised = denoise(x, i)
        denoised = denoised.clamp(-1.0, 1.0) if clip_denoised else denoised
        source, following = levels[i : i + 2]
        target = following if stride is None else _strided(source, stride, levels[-1])
        fresh = eta * target * math.sqrt(1.0 - (target / source) ** 2)
        noise = (x - (denoise.unlimited if conventions and eta < 1.0 else denoised)) / source
        x = denoised + math.sqrt(target**2 - fresh**2) * noise
        if fresh > 0.0:
            x = x + fresh * draw(source, target)
        if target != following:
            x = x * math.sqrt((1.0 + following**2) / (1.0 + target**2))
    return x


def _strided(source, stride, last):
    """The noise level a count of timesteps before another one, the last level where that is before the first time."""
    time = round(timesteps_from_sigmas(source).item()) - stride
    return last if time < 0 else noise_levels(time).item()
