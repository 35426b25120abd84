"""The door to the solvers, which lie beside this package: for all that the model shares with them."""

# On the command line `pixart` is a package of its own, in ComfyUI it lies within the pack.
if __package__ == "pixart":
    from samplers import SAMPLERS
    from samplers.contract import traits_of
    from samplers.from_diffusers import Asked, read_scheduler
    from samplers.lcm import boundary_scalings
    from samplers.noise import SampleNoise, noise_seeds
    from samplers.presets import PRESETS
    from samplers.schedules import (
        DMD_TIMESTEP,
        NUM_TIMESTEPS,
        SCHEDULES,
        make_betas,
        schedule_sigmas,
        timesteps_from_sigmas,
        timesteps_where_sigmas_are,
    )
else:
    from ..samplers import SAMPLERS
    from ..samplers.contract import traits_of
    from ..samplers.from_diffusers import Asked, read_scheduler
    from ..samplers.lcm import boundary_scalings
    from ..samplers.noise import SampleNoise, noise_seeds
    from ..samplers.presets import PRESETS
    from ..samplers.schedules import (
        DMD_TIMESTEP,
        NUM_TIMESTEPS,
        SCHEDULES,
        make_betas,
        schedule_sigmas,
        timesteps_from_sigmas,
        timesteps_where_sigmas_are,
    )

__all__ = [
    "DMD_TIMESTEP",
    "NUM_TIMESTEPS",
    "PRESETS",
    "SAMPLERS",
    "SCHEDULES",
    "Asked",
    "SampleNoise",
    "boundary_scalings",
    "make_betas",
    "noise_seeds",
    "read_scheduler",
    "schedule_sigmas",
    "timesteps_from_sigmas",
    "timesteps_where_sigmas_are",
    "traits_of",
]
