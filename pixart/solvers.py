"""The pack's solvers, for what runs outside ComfyUI."""

import importlib

# `pixart` is a package of its own on the command line and lies within the pack in ComfyUI; `samplers` is beside it.
_PARENT = __package__.rpartition(".")[0]


def _load(module: str):
    return importlib.import_module(f"{_PARENT}.{module}" if _PARENT else module)


SAMPLERS = _load("samplers").SAMPLERS
SCHEDULES = _load("samplers.schedules").SCHEDULES
PRESETS = _load("samplers.presets").PRESETS
schedule_sigmas = _load("samplers.schedules").schedule_sigmas
timesteps_from_sigmas = _load("samplers.schedules").timesteps_from_sigmas
SampleNoise = _load("samplers.noise").SampleNoise
noise_seeds = _load("samplers.noise").noise_seeds
