"""The best state of a training by its validation loss: found, kept, and read back."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ...files.atomic import dump, write_atomically
from ...quoting import plain
from ..state import UNREADABLE, read_checked

logger = logging.getLogger(__name__)

BEST = "best.pt"  # in a run's folder


@dataclass
class Best:
    """The lowest validation loss, of the step that had it, and how many were measured since."""

    loss: float = math.inf
    step: int = -1
    since: int = 0

    def follow(self, step: int, loss: float) -> bool:
        """Take in a validation; True when it is the best one so far."""
        if loss < self.loss:
            self.loss, self.step, self.since = loss, step, 0
            return True
        self.since += 1
        return False

    def state(self) -> dict:
        """For a checkpoint."""
        return asdict(self)


def write_best(folder: Path, best: Best, weights: Mapping[str, Tensor]) -> str | None:
    """Keep the weights in a run's folder. Returns what to tell the user where there is no room for them."""
    state = {"step": best.step, "loss": best.loss, "parameters": dict(weights)}
    try:
        write_atomically(folder / BEST, lambda temporary: dump(state, temporary))
    except OSError as error:
        logger.warning("The best state so far cannot be kept: %s", error)
        return f"the best state so far is not kept ({plain(str(error.strerror or error), 200)})"
    return None


def read_best(folder: Path) -> dict | None:
    """{"step", "loss", "parameters"}, or None where there is none that is undamaged."""
    path = Path(folder) / BEST
    if not path.is_file():
        return None
    try:
        return read_checked(path, {"step", "loss", "parameters"})
    except UNREADABLE as error:
        logger.warning("The best state is damaged and is left out: %s", error)
        return None
