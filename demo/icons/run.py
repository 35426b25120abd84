"""Run one stage towards its number of steps: may be stopped at any time and goes on from its checkpoint."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...pixart.files.atomic import write_atomically
from ...pixart.weights.pickles import check_pth
from ..loop import cosine_factor

LOG_EVERY = 20  # steps
logger = logging.getLogger(__name__)


class Stopped(RuntimeError):
    """The training was asked to stop before its end; what it has is kept."""


class Stage(Protocol):
    """One thing to train. What is random is drawn from the step's number, so a resumed run goes on alike."""

    def batches(self) -> Dataset: ...

    def step(self, number: int, learning_rate_factor: float, progress: float, batch) -> dict[str, float]: ...

    def measure(self) -> dict[str, float]: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


def read_checkpoint(folder: Path) -> dict | None:
    """{"stage", "step", "seconds"} of a stage's folder; None before its first checkpoint."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    check_pth(path)
    return torch.load(path, weights_only=True, map_location="cpu")


def _batches(dataset: Dataset, first: int, last: int, workers: int) -> Iterator:
    """The batches of these steps, in order; drawn ahead by `workers` processes, none for 0."""
    options = {"prefetch_factor": 8, "multiprocessing_context": "spawn"} if workers else {}
    return iter(DataLoader(dataset, batch_size=None, sampler=range(first, last), num_workers=workers, **options))


class Checkpoints:
    """A stage's checkpoint and its log in `folder`, with the steps made and the seconds spent."""

    def __init__(self, stage: Stage, folder: Path):
        self.stage, self.folder = stage, folder
        folder.mkdir(parents=True, exist_ok=True)
        state = read_checkpoint(folder)
        self.step, self.seconds = (state["step"], state["seconds"]) if state else (0, 0.0)
        if state:
            stage.load_state_dict(state["stage"])
            logger.info("%s: goes on at step %d after %.0f s", folder.name, self.step, self.seconds)
        self._tick = time.monotonic()

    def count(self) -> None:
        """One step more."""
        now = time.monotonic()
        self.step, self.seconds, self._tick = self.step + 1, self.seconds + now - self._tick, now

    def save(self) -> None:
        state = {"stage": self.stage.state_dict(), "step": self.step, "seconds": self.seconds}
        write_atomically(self.folder / "checkpoint.pt", lambda temporary: torch.save(state, temporary))

    def log(self, metrics: dict[str, float]) -> None:
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **metrics}) + "\n")


def run_stage(
    stage: Stage,
    folder: Path,
    steps: int,
    *,
    hold: float,
    stop: Callable[[], bool] = lambda: False,
    workers: int = 0,
    save_every_s: float = 150,
    measure_every: int = 400,
) -> None:
    """Train until `steps` are made. hold: share of them at the full learning rate. Raises Stopped after `stop()`.

    Writes folder/checkpoint.pt and folder/log.jsonl, every `measure_every` steps with what the stage measures.
    """
    kept = Checkpoints(stage, folder)
    last_save = time.monotonic()
    with tqdm(total=steps, initial=kept.step, desc=folder.name, unit="step", mininterval=5) as bar:
        for batch in _batches(stage.batches(), kept.step, steps, workers):
            progress = kept.step / steps
            metrics = stage.step(kept.step, cosine_factor(progress, hold), progress, batch)
            kept.count()
            bar.update()
            if kept.step % measure_every == 0:
                metrics |= stage.measure()
            if kept.step % LOG_EVERY == 0:
                kept.log(metrics)
            stopped = stop()
            if stopped or time.monotonic() - last_save > save_every_s:
                kept.save()
                last_save = time.monotonic()
            if stopped:
                raise Stopped(f"Stopped {folder.name} at step {kept.step}. The same command goes on.")
    kept.save()
