"""Everything that is random about one picture of one forward pass, drawn from its number alone: noise, time, dropout.

So a run that is continued, shared out among processes, or computes its blocks twice draws what an unbroken run of one
process draws.
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
    settings: TrainingSettings,
    forward: int | str,
    positions: Sequence[int],
    shape: Sequence[int],
    grid: Tensor | None = None,
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


def variant_chances(settings: TrainingSettings, forward: int, position: int) -> Random:
    """What decides which variant of a picture is shown at a position of the global batch of a forward pass."""
    return Random(f"{settings.seed} {forward} {position} variant")


def draw_timestep(settings: TrainingSettings, rng: Random, timesteps: Sequence[int]) -> int:
    """One of ascending timesteps; log-normal: SD3's logit-normal over them. Source: arXiv 2403.03206."""
    count = len(timesteps)
    if settings.timesteps == "uniform":
        return timesteps[rng.randrange(count)]
    share = 1 / (1 + math.exp(-rng.gauss(settings.timestep_mean, settings.timestep_std)))
    return timesteps[min(int(share * count), count - 1)]


_ROWS = 512  # masks are drawn for as many tokens at a time, so that a caption's does not depend on its padding


@dataclass(frozen=True)
class Chances:
    """What decides the dropout of one forward pass.

    name: of the training and the pass. positions: of the batch's pictures in the global batch.
    """

    name: str
    positions: Sequence[int]

    def drop(self, x: Tensor, share: float, layer: int) -> Tensor:
        """x with a share of its numbers at 0 and the others scaled up, the same each time.

        x: (B, tokens, C), each picture with a mask of its own; or (rows, C) of timesteps and sizes, which pictures
        may have in common, with one mask for all rows.
        """
        if x.ndim == 2:
            kept = self._draw(x, share, f"{layer}")[:1]
        else:
            kept = torch.stack([self._draw(x[0], share, f"{layer} {position}") for position in self.positions])
        return x * kept / (1 - share)

    def _draw(self, like: Tensor, share: float, name: str) -> Tensor:
        """(rows, C) bool, True with probability 1 - share."""
        rows, channels = like.shape
        seed = Random(f"{self.name} {name}").getrandbits(63)  # of a text: its hash does not depend on the process
        generator = torch.Generator(like.device).manual_seed(seed)
        drawn = torch.rand(-(-rows // _ROWS) * _ROWS, channels, generator=generator, device=like.device)
        return drawn[:rows] >= share
