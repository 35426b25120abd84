"""Solvers for PixArt's diffusion process. They need torch alone and keep one contract:

``sample_x(model, x, sigmas, extra_args=None, callback=None, disable=None, ...)``

where ``model(x, sigma, **extra_args)`` returns the denoised latent, x is variance exploding and sigmas descend.
"""

from .dpm_solver import sample_dpm_solver

SAMPLERS = {
    "dpm_solver": sample_dpm_solver,
}

__all__ = ["SAMPLERS"]
