"""Errors by timestep: a loss that falls at some noise levels may rise at others."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...diffusion import TRAIN_STEPS

BINS = 10
LABELS = tuple(f"{first}-{first + TRAIN_STEPS // BINS - 1}" for first in range(0, TRAIN_STEPS, TRAIN_STEPS // BINS))


def by_timestep(errors: Tensor | None = None, timestep: Tensor | None = None) -> Tensor:
    """(2, BINS): the sum of the errors of a batch, (B,), in each bin of their timesteps, (B,), and how many there are.

    Without any it is empty: (BINS,) zeros for each.
    """
    if errors is None:
        return torch.zeros(BINS)
    bins = timestep * BINS // TRAIN_STEPS
    is_in = bins[:, None] == torch.arange(BINS, device=bins.device)  # (B, BINS)
    errors = errors.detach()[:, None]
    return torch.stack([torch.where(is_in, errors, 0.0).sum(0), is_in.sum(0).to(errors.dtype)])


class ByTimestep:
    """Mean errors by timestep over a stretch of steps, and those of the first stretch to compare with."""

    def __init__(self, state: Mapping | None = None):
        state = state or {"errors": [0.0] * BINS, "counts": [0.0] * BINS, "first": None, "last": None}
        self.errors, self.counts = list(state["errors"]), list(state["counts"])
        self.first, self.last = state["first"], state["last"]

    def add(self, sums: Sequence[float]) -> None:
        """Take in a step: BINS sums of errors, then how many each is of."""
        self.errors = [a + b for a, b in zip(self.errors, sums[:BINS], strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, sums[BINS:], strict=True)]

    def means(self) -> list[float | None] | None:
        """Those of the stretch so far, None for bins without any; None where there are none at all."""
        if not any(self.counts):
            return None
        return [e / c if c else None for e, c in zip(self.errors, self.counts, strict=True)]

    def close(self) -> list[float | None] | None:
        """The same, and a new stretch begins."""
        means = self.means()
        if means is None:
            return None
        self.errors, self.counts = [0.0] * BINS, [0.0] * BINS
        self.first, self.last = self.first or means, means
        return means

    def state(self) -> dict:
        """What makes the same again, for a checkpoint."""
        return {"errors": self.errors, "counts": self.counts, "first": self.first, "last": self.last}
