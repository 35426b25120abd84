"""Solvers for PixArt's diffusion process. They need torch alone and keep one contract:

``sample_x(model, x, sigmas, extra_args=None, callback=None, disable=None, ...)``

where ``model(x, sigma, **extra_args)`` returns the denoised latent, x is variance exploding and sigmas descend.
"""

from .ddim import sample_ddim
from .dmd import sample_dmd
from .dpm_solver import sample_dpm_solver
from .iddpm import sample_iddpm
from .lcm import sample_lcm
from .sa_solver import sample_sa_solver

SAMPLERS = {
    "sa_solver": sample_sa_solver,
    "dpm_solver": sample_dpm_solver,
    "iddpm": sample_iddpm,
    "ddim": sample_ddim,
    "lcm": sample_lcm,
    "dmd": sample_dmd,
}

__all__ = ["SAMPLERS"]
