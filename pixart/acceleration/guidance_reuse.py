"""Guidance in one of several steps: between them the difference of two prompts' predictions goes on as it was."""

import bisect
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from ..quoting import shorten

HOLD, LINE = FORECASTS = ("as it was", "along a line")
SLACK = 1e-4  # of a noise level: solvers compute theirs in float32
LONGEST_LINE = 3.0  # of the distances between the last two differences


@dataclass(frozen=True)
class GuidanceReuse:
    """How often a difference is computed: in the first of `every` steps, and in all before start_percent.

    every: 1 or more; 1 is exact. forecast: of FORECASTS. start_percent: of the steps.
    Raises ValueError for other numbers and words.
    """

    every: int
    forecast: str = HOLD
    start_percent: float = 0.0

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"Wrong guidance reuse: got {self.every}, expected 1 or more steps. 1 turns it off.")
        if self.forecast not in FORECASTS:
            raise ValueError(
                f"Unknown forecast: got {shorten(self.forecast)}, expected one of {', '.join(FORECASTS)}. Choose one."
            )

    def begin(self, levels: Sequence[float], active: Callable[[float], bool] | None = None) -> "KeptGuidance":
        """The state of one sampling run. levels: its noise levels, descending. active: whether one may be skipped at,
        in place of start_percent.
        """
        first = math.ceil(self.start_percent * (len(levels) - 1) - SLACK)
        return KeptGuidance(self, levels, active or (lambda level: _step_at(levels, level) >= first))


class KeptGuidance:
    """The differences of one sampling run, by key, divided by the noise level: a solver may ask for any.

    A step is known by the noise level, not by how often the model was called: solvers of second order evaluate
    twice a step, and some look back.
    """

    def __init__(self, settings: GuidanceReuse, levels: Sequence[float], active: Callable[[float], bool]):
        self.settings, self.levels, self.active = settings, list(levels), active
        self.known: dict[Hashable, list[tuple[float, torch.Tensor]]] = {}
        self.computed, self.reused = 0, 0

    def keep(self, key: Hashable, level: float, difference: torch.Tensor) -> None:
        """Notes what was computed at a noise level."""
        place = _place(level)
        kept = [entry for entry in self.known.get(key, []) if abs(entry[0] - place) > SLACK]
        self.known[key] = [*kept[-1:], (place, difference)]

    def recall(self, key: Hashable, level: float) -> torch.Tensor | None:
        """The difference at a noise level; None where it has to be computed."""
        if _step_at(self.levels, level) % self.settings.every == 0 or not self.active(level):
            return None
        entries = self.known.get(key)
        if not entries:
            return None
        place, last = entries[-1]
        if self.settings.forecast == HOLD or len(entries) == 1:
            return last
        before, earlier = entries[0]
        distance = min(max((_place(level) - place) / (place - before), 0.0), LONGEST_LINE)
        return torch.lerp(earlier, last, 1.0 + distance)

    def clear(self) -> None:
        """Let go of all tensors."""
        self.known.clear()


def _step_at(levels: Sequence[float], level: float) -> int:
    """The number of the step that a noise level belongs to: from one of the run's levels down to the next."""
    return max(bisect.bisect_right(levels, -level * (1 - SLACK), key=lambda each: -each) - 1, 0)


def _place(level: float) -> float:
    return math.log(max(level, 1e-6))
