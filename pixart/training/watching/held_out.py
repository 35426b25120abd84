"""The loss on pictures that are not trained on, at noise and timesteps that stay the same through a training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from torch import Tensor

from ...data.buckets import Bins
from ...data.examples import FeatureSet, check_finite, collate
from ...quoting import shorten
from ..draws import Draws, draw_batch
from ..objectives import Objective
from ..processes import SingleProcess
from ..settings import MATCHED, TrainingSettings
from .timesteps import by_timestep

MOST_PICTURES = 1000  # of a share: more say the same to a few thousandths, and cost as many passes
TIMES = 4  # of each picture, spread over the timesteps


def choose_held_out(features: FeatureSet, share: float, seed: int) -> np.ndarray:
    """The numbers of the pictures that are not trained on: a share of those that are no priors, at most MOST_PICTURES.

    They depend on the seed and the number of pictures alone; of a stream they are of as few shards as that takes.
    Raises ValueError where nothing would be left to train on.
    """
    own = np.flatnonzero(~np.asarray(features.is_prior, bool))
    count = min(max(round(share * len(own)), 1), MOST_PICTURES)
    if count >= len(own):
        raise ValueError(
            f"Nothing left to train on: got {len(own)} pictures with a validation share of {share:g}, expected at "
            f"least 2 and a smaller share. Add pictures, lower the share, or validate on a dataset of its own."
        )
    rng, blocks = Random(f"{seed} held out"), getattr(features, "blocks", None)
    if blocks is None:
        return np.sort(own[rng.sample(range(len(own)), count)])
    order = list(range(int(blocks.max()) + 1))
    rng.shuffle(order)
    return np.sort(own[np.argsort(np.array(order)[blocks[own]], kind="stable")][:count])


@dataclass(frozen=True)
class Measured:
    """loss: the mean error of all pictures at all times. by_timestep: of each bin (see timesteps), None without any."""

    loss: float
    by_timestep: tuple[float | None, ...]


class HeldOut:
    """Measures the loss on some pictures of a set. The training that it looks at is not changed by it.

    indices: of the pictures, None for all. Raises ValueError for an objective whose loss says nothing there.
    """

    def __init__(self, features: FeatureSet, indices: Sequence[int] | None, settings: TrainingSettings):
        if settings.kind in MATCHED:
            raise ValueError(
                f"No loss to validate: got kind {shorten(settings.kind)}, whose two networks follow each other, "
                f"expected another kind. Look at validation pictures instead."
            )
        self.features, self.indices = features, range(len(features)) if indices is None else indices
        self.settings = replace(settings, caption_dropout=0.0, noise_offset=0.0)
        self._batches = _batches(Bins.of(features.bins), self.indices, settings.batch_size)

    @torch.no_grad()
    def measure(self, objective: Objective, called, processes: SingleProcess) -> Measured:
        """Of the weights as they are. called: the objective as processes prepared it; all of them come here.

        Where weights are shared out all compute all; elsewhere the first does.
        """
        sums = torch.zeros(2 + 2 * len(by_timestep()), dtype=torch.float64, device=processes.device)
        if processes.is_sharded or processes.rank == 0:
            function = called if processes.is_sharded else objective
            for batch in self._batches:
                for time in range(TIMES):
                    sums += self._sums(objective, function, batch, time, processes.device)
        if not processes.is_sharded and processes.world_size > 1:
            sums = processes.mean(sums) * processes.world_size
        total, count, *rest = sums.tolist()
        errors, counts = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        bins = tuple(error / of if of else None for error, of in zip(errors, counts, strict=True))
        return Measured(total / count, bins)

    def _sums(self, objective: Objective, function, chosen: Sequence[int], time: int, device) -> Tensor:
        """(2 + 2 bins,): the error and how many, and the same by bins."""
        examples = [check_finite(self.features[index], self.features.name_of(index)) for index in chosen]
        batch = collate(examples).to(device)
        draws = self._draws(chosen, time, batch.latent.shape[1:], objective.grid).to(device)
        with torch.autocast(device.type, objective.dtype, enabled=objective.autocast):
            loss = function(batch, draws)
        each = (loss.error.expand(len(chosen)) if loss.each is None else loss.each).double()
        total = torch.stack([each.sum(), each.new_tensor(float(len(chosen)))])
        return torch.cat([total, by_timestep(each, draws.timestep).flatten()])

    def _draws(self, chosen: Sequence[int], time: int, shape, grid) -> Draws:
        """Of each picture the noise and a timestep of the `time`-th of TIMES equal shares of all timesteps."""
        settings = self.settings
        rows = [draw_batch(settings, f"held out {time}", [int(index)], shape, grid) for index in chosen]
        times = range(settings.timestep_min, settings.timestep_max + 1) if grid is None else grid.tolist()
        steps = []
        for index in chosen:
            share = (time + Random(f"{settings.seed} held out {time} {index}").random()) / TIMES
            steps.append(times[int(share * len(times))])
        return Draws(
            noise=torch.cat([row.noise for row in rows]),
            posterior_noise=torch.cat([row.posterior_noise for row in rows]),
            timestep=torch.tensor(steps),
            dropped=torch.zeros(len(rows), dtype=torch.bool),
        )


def _batches(bins: Bins, indices: Sequence[int], size: int) -> list[list[int]]:
    by_bin: dict[tuple[int, int], list[int]] = {}
    for index in map(int, indices):
        by_bin.setdefault(bins[index], []).append(index)
    return [own[first : first + size] for own in by_bin.values() for first in range(0, len(own), size)]
