"""Finds a learning rate: a short training whose rate rises, and what it does to a loss at fixed noise.

Source: arXiv 1506.01186, section 3.3.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...data.examples import FeatureSet
from ...transformer import PixArt
from ..build import make_objective
from ..loop import Trainer
from ..processes import SingleProcess
from ..sanity import TrainingDiverged
from ..settings import TrainingSettings
from .held_out import HeldOut

LOWEST, RANGE = 1e-7, 1e6  # the rates go from the one to so many times it; Prodigy's factors are 10^4 times as high
COUNT, STEPS_EACH, PICTURES = 25, 3, 8
_LOST = 2.0  # times the lowest loss: what comes after it says no more


@dataclass(frozen=True)
class Rates:
    """points: (learning rate, loss after some steps at it), the rates rising. suggested: one of them, or None."""

    points: tuple[tuple[float, float], ...]
    suggested: float | None

    def lines(self) -> list[str]:
        """A table."""
        first = self.points[0][1]
        rows = [f"{rate:9.2e}  {loss:8.5f}  {100 * (loss / first - 1):+7.2f} %" for rate, loss in self.points]
        marks = ["  <- suggested" if rate == self.suggested else "" for rate, _ in self.points]
        return ["     rate      loss     change", *(row + mark for row, mark in zip(rows, marks, strict=True))]


def find_rate(
    model: PixArt,
    features: FeatureSet,
    settings: TrainingSettings,
    device: torch.device | str = "cpu",
    told: Callable[[int, int], None] | None = None,
) -> Rates:
    """Train a few steps at each of rising rates, from the model as it is, and measure after each. Keeps nothing.

    The model becomes part of it and is changed. told: called with how many rates are done, of how many.
    Raises ValueError as a training does.
    """
    scale = 1e4 if settings.optimizer == "prodigy" else 1.0
    rates = [scale * LOWEST * RANGE ** (number / (COUNT - 1)) for number in range(COUNT)]
    quiet = {"checkpoint_every": 0, "sample_every": 0, "tensorboard": False, "wandb": False, "ema_decay": 0.0}
    settings = replace(settings, **quiet, validation_share=0.0, steps=COUNT * STEPS_EACH, patience=0)
    held = HeldOut(features, range(min(PICTURES, len(features))), settings)
    with tempfile.TemporaryDirectory(prefix="pixart-") as folder:
        objective = make_objective(model, settings, device, features.null_caption)
        finder = _Rising(objective, features, settings, Path(folder), SingleProcess(device))
        finder.rates, finder.held, finder.told = rates, held, told
        try:
            finder.run(resume=False)
        except TrainingDiverged:  # the end of what can be measured
            pass
    points = tuple(finder.points)
    return Rates(points, suggest(points))


class _Rising(Trainer):
    """A training whose rate rises, and that keeps no checkpoint."""

    rates: Sequence[float]
    held: HeldOut
    told: Callable[[int, int], None] | None

    def run(self, resume=True):
        self.points: list[tuple[float, float]] = []
        return super().run(resume)

    def rate(self):
        return self.rates[min(self.step // STEPS_EACH, COUNT - 1)]

    def _tell(self, seconds):
        super()._tell(seconds)
        if self.step % STEPS_EACH:
            return
        self.objective.eval()
        with self.averaged():
            loss = self.held.measure(self.objective, self.prepared, self.processes).loss
        self.objective.train()
        lowest = min((each for _, each in self.points), default=loss)
        if not math.isfinite(loss) or loss > _LOST * lowest:
            self.is_stopping = True
            return
        self.points.append((self.rates[self.step // STEPS_EACH - 1], loss))
        if self.told is not None:
            self.told(len(self.points), COUNT)

    def _save(self):
        """Nothing of it is to stay."""

    def _save_what_is_whole(self):
        """Nothing of it is to stay."""


def suggest(points: Sequence[tuple[float, float]]) -> float | None:
    """The rate at which the loss falls fastest by the logarithm of the rate; None where it never falls.

    Slopes are over three points, since single ones are noisy; only before the lowest loss.
    """
    if len(points) < 3:
        return None
    lowest = min(range(len(points)), key=lambda place: points[place][1])
    slopes = {}
    for place in range(1, min(lowest + 1, len(points) - 1)):
        (left, high), (right, low) = points[place - 1], points[place + 1]
        slopes[points[place][0]] = (low - high) / math.log(right / left)
    falling = {rate: slope for rate, slope in slopes.items() if slope < 0}
    return min(falling, key=falling.get) if falling else None
