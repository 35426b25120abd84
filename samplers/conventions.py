"""What diffusers' schedulers do with a model beside the solver's own maths: rounded times, and limits of the answer."""

import functools
import math
import reprlib
from dataclasses import dataclass

import torch

from .schedules import LAST_TIMESTEP, NUM_TIMESTEPS
from .schedules import sigmas as noise_levels

TIMES = ("exact", "linear", "log_sigma", "rounded", "floored")
INTEGER_SLACK = 1e-3  # a time that is an integer but for the rounding of its level


@dataclass(frozen=True)
class Conventions:
    """times: at which time the model is asked for a noise level between two of the table: "exact" is PixArt's own; the
    others interpolate sigma ("linear") or its logarithm ("log_sigma"), then also rounded or floored.

    clip: the largest number of the denoised latent. threshold: the share of its numbers that is kept below the limit,
    and the largest limit, as in dynamic thresholding (arXiv 2205.11487, section 2.3).
    """

    times: str = "exact"
    clip: float | None = None
    threshold: tuple[float, float] | None = None

    def __post_init__(self):
        if self.times not in TIMES:
            raise ValueError(
                f"Unknown times: got {reprlib.repr(self.times)}, expected one of {', '.join(TIMES)}. Choose exact."
            )

    def ask(self, model, x, level, extra_args):
        """The denoised latent of x (B, C, H, W) at a noise level, the model asked at the time of the convention."""
        asked = level if self.times == "exact" else _level_of(_time_of(level, self.times))
        rows = x.shape[0]  # below, one number expanded: by which a model sees that all rows are alike
        if asked == level:
            return model(x, x.new_full((1,), level).expand(rows), **extra_args)
        scaled = x * math.sqrt((1.0 + asked**2) / (1.0 + level**2))
        noise = (scaled - model(scaled, x.new_full((1,), asked).expand(rows), **extra_args)) / asked
        return x - level * noise

    def limit(self, denoised):
        """The denoised latent (B, C, H, W) within its limits."""
        if self.threshold is not None:
            share, most = self.threshold
            numbers = denoised.flatten(1).float() if denoised.dtype == torch.float16 else denoised.flatten(1)
            found = torch.quantile(numbers.abs(), share, dim=1).clamp(1.0, most)
            found = found.to(denoised).view(-1, *[1] * (denoised.ndim - 1))
            return torch.maximum(torch.minimum(denoised, found), -found) / found
        return denoised if self.clip is None else denoised.clamp(-self.clip, self.clip)


AS_IT_IS = Conventions()


def _time_of(level, times):
    """The time of a noise level, between 0 and 999, by straight lines through the table."""
    table = _table()
    high = int(torch.searchsorted(table, level).clamp(1, NUM_TIMESTEPS - 1))
    below, above = table[high - 1].item(), table[high].item()
    if times != "linear":
        below, above, level = math.log(below), math.log(above), math.log(level)
    time = min(max(high - 1 + (level - below) / (above - below), 0.0), LAST_TIMESTEP)
    nearest = float(round(time))
    if times == "rounded" or abs(time - nearest) < INTEGER_SLACK:
        return nearest
    return float(math.floor(time)) if times == "floored" else time


@functools.cache
def _table():
    return noise_levels(torch.arange(NUM_TIMESTEPS))


def _level_of(time):
    return noise_levels(time).item()
