"""Everything that is random about one picture of one forward pass, told by its number alone.

So a run that is continued, or shared out among processes, draws what an unbroken run of one process draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from random import Random

import torch
from torch import Tensor

from .settings import TrainingSettings


@dataclass(frozen=True)
class Draws:
    """The chances of a batch.

    noise: (B, C, h, w) what is to be predicted. posterior_noise: (B, C, h, w), for sampling the autoencoder's latent.
    timestep: (B,) integer. dropped: (B,) bool, True = without its caption.
    """

    noise: Tensor
    posterior_noise: Tensor
    timestep: Tensor
    dropped: Tensor

    def to(self, device: torch.device | str) -> "Draws":
        """The same on a device."""
        return Draws(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def draw_batch(
    settings: TrainingSettings, forward: int, positions: Sequence[int], shape: Sequence[int], grid: Tensor | None = None
) -> Draws:
    """Draw for the pictures at `positions` of the global batch of forward pass number `forward`.

    shape: (C, h, w) of the latents. grid: the timesteps to choose among, all within the settings' range by default.
    """
    rows = [_draw_one(settings, forward, position, shape, grid) for position in positions]
    noise, posterior_noise, timestep, dropped = zip(*rows, strict=True)
    return Draws(torch.stack(noise), torch.stack(posterior_noise), torch.tensor(timestep), torch.tensor(dropped))


def _draw_one(settings, forward, position, shape, grid):
    rng = Random(f"{settings.seed} {forward} {position}")  # of a text: its hash does not depend on the process
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    noise, posterior_noise = torch.randn(2, *shape, generator=generator)
    if settings.noise_offset:
        noise = noise + settings.noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
    timesteps = range(settings.timestep_min, settings.timestep_max + 1) if grid is None else grid.tolist()
    return noise, posterior_noise, draw_timestep(settings, rng, timesteps), rng.random() < settings.caption_dropout


def draw_timestep(settings: TrainingSettings, rng: Random, timesteps: Sequence[int]) -> int:
    """One of ascending timesteps; log-normal: SD3's logit-normal over them. Source: arXiv 2403.03206."""
    count = len(timesteps)
    if settings.timesteps == "uniform":
        return timesteps[rng.randrange(count)]
    share = 1 / (1 + math.exp(-rng.gauss(settings.timestep_mean, settings.timestep_std)))
    return timesteps[min(int(share * count), count - 1)]
