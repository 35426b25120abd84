"""Whether a training still learns: how an exploding loss differs from a noisy one."""

import math


class TrainingDiverged(RuntimeError):
    """The loss is not a number or exploded; the message says what to change."""


class Sanity:
    """Recognises an exploding loss by the geometric mean of the last steps' errors.

    highest: the largest sane error, or None where errors have no fixed scale: then a hundred times the lowest mean.
    """

    warm_up, memory, rise = 20, 0.9, 100.0

    def __init__(self, highest: float | None):
        self.highest, self.count, self.mean_log, self.lowest_log = highest, 0, 0.0, math.inf
        self.last = 0.0

    def follow(self, error: float) -> bool:
        """Take in the error of a step; False when their mean is not sane any more."""
        self.count, self.last = self.count + 1, error
        rate = max(1 - self.memory, 1 / self.count)
        self.mean_log += rate * (math.log(max(error, 1e-30)) - self.mean_log)
        if self.count < self.warm_up:
            return True
        self.lowest_log = min(self.lowest_log, self.mean_log)
        return self.mean <= self.limit

    @property
    def is_calm(self) -> bool:
        """Whether the last errors are far from exploding, on average and the very last."""
        return max(self.last, self.mean) <= self.limit / 2

    @property
    def mean(self) -> float:
        """Of the last errors."""
        return math.exp(self.mean_log)

    @property
    def limit(self) -> float:
        """What the mean may reach."""
        return self.rise * math.exp(self.lowest_log) if self.highest is None else self.highest

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {"count": self.count, "mean_log": self.mean_log, "lowest_log": self.lowest_log}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state_dict."""
        self.count, self.mean_log, self.lowest_log = state["count"], state["mean_log"], state["lowest_log"]
