"""IDDPM: ancestral sampling with a learned variance range. Source: arXiv 2102.09672."""

import logging
import math

import torch

from .contract import Denoiser, check_sigmas, steps
from .noise import noise_source


def sample_iddpm(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    noise_sampler=None,
    variance=None,
    clip_denoised=False,
    noise_device="cpu",
):
    """Walk back through the (respaced) Markov chain whose noise levels are the sigmas.

    model(x, sigma, **extra_args) -> denoised. x: (B, C, H, W), variance exploding. sigmas: descending, >= 2 values.
    variance: a function of no arguments, called after each evaluation of the model; returns that evaluation's variance
        channels, (B, C, H, W), -1 for the posterior variance and 1 for beta. None, or a result of None, uses the
        posterior variance throughout, with a warning.
    clip_denoised: limit the denoised latent to [-1, 1]. noise_sampler and noise_device: see sa_solver.
    Returns the latent at the last sigma.
    """
    levels = check_sigmas(sigmas)
    draw = noise_source(x, noise_sampler, extra_args, noise_device)
    denoise = Denoiser(model, levels, extra_args, callback)
    warned = False
    for i in steps(levels, disable):
        denoised = denoise(x, i)
        denoised = denoised.clamp(-1.0, 1.0) if clip_denoised else denoised
        source, target = levels[i : i + 2]
        fraction = variance() if variance is not None else None
        if fraction is None and not warned:
            logging.warning("The model gave no variance channels; IDDPM uses the posterior variance instead.")
            warned = True
        x = denoised + (target / source) ** 2 * (x - denoised)
        if target > 0.0:
            x = x + draw(source, target) * _deviation(source, target, fraction)
    return x


def _deviation(source, target, fraction):
    """Standard deviation of one step's noise, variance exploding: a float, or (B, C, H, W) from variance channels."""
    # Variance-preserving variances over alpha_bar of the target, which is 1 / (1 + target^2).
    log_posterior = math.log(target**2 * (source**2 - target**2) / source**2)
    if fraction is None:
        return math.exp(0.5 * log_posterior)
    log_beta = math.log((source**2 - target**2) * (1.0 + target**2) / (1.0 + source**2))
    # Numbers of Python's alone: to make a tensor of one is to wait for the device.
    return torch.exp(0.5 * log_posterior + (fraction + 1.0) * (0.25 * (log_beta - log_posterior)))
