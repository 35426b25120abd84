"""Latent consistency sampling, 1 to 8 steps. Source: arXiv 2310.04378; for PixArt, arXiv 2401.05252."""

import math

from .contract import Denoiser, check_sigmas, steps
from .noise import noise_source
from .schedules import timesteps_from_sigmas

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def sample_lcm(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    noise_sampler=None,
    noise_device="cpu",
    conventions=None,
):
    """Alternate between the consistency function, which jumps to a clean picture, and noising it to the next level.

    model(x, sigma, **extra_args) -> denoised. x: (B, C, H, W), variance exploding. sigmas: descending, >= 2 values.
    noise_sampler and noise_device: see sa_solver. conventions: limits of diffusers' schedulers. Guidance is the
        model's own affair: official LCM weights run without.
    Returns the latent at the last sigma, the consistency function's value when that is 0.
    """
    levels = check_sigmas(sigmas)
    draw = noise_source(x, noise_sampler, extra_args, noise_device)
    denoise = Denoiser(model, levels, extra_args, callback, conventions)
    times = timesteps_from_sigmas(levels).tolist()
    for i in steps(levels, disable):
        c_skip, c_out = boundary_scalings(times[i])
        skip = c_skip / math.sqrt(1.0 + levels[i] ** 2)
        x = c_out * denoise(x, i) + skip * x
        if levels[i + 1] > 0.0:
            x = x + levels[i + 1] * draw(levels[i], levels[i + 1])
    return x


def boundary_scalings(timestep):
    """c_skip and c_out, which make the consistency function the identity at t = 0. timestep: float or tensor."""
    scaled = TIMESTEP_SCALING * timestep
    total = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total**0.5
