"""The training loop that every stage of the demo shares: time or step budget, resume, atomic checkpoints, a log."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..pixart.files.atomic import write_atomically
from ..pixart.weights.pickles import check_pth

logger = logging.getLogger(__name__)


class Stage(Protocol):
    """One thing to train. What is random in `step` is drawn from the step's number, so a resumed run goes on alike."""

    def step(self, number: int, learning_rate_factor: float, progress: float) -> dict[str, float]: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Resumable:
    """The state of a stage that trains a `model` by an `optimizer` and keeps its average in `ema`."""

    def state_dict(self) -> dict:
        parts = {"model": self.model, "optimizer": self.optimizer, "ema": self.ema}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])


class Together:
    """Several optimisers as one, each with parameters of its own."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for each in self.optimizers for group in each.param_groups]

    def zero_grad(self) -> None:
        for each in self.optimizers:
            each.zero_grad()

    def step(self) -> None:
        for each in self.optimizers:
            each.step()

    def state_dict(self) -> dict:
        return {"optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        for each, own in zip(self.optimizers, state["optimizers"], strict=True):
            each.load_state_dict(own)


def cosine_factor(progress: float, hold: float = 0.0, floor: float = 0.02) -> float:
    """1 until `hold` of the run, then a half cosine down to `floor`. progress: 0 to 1."""
    if progress <= hold:
        return 1.0
    fraction = min((progress - hold) / (1 - hold), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * fraction))


def clip_gradients(parameters: list[Tensor], limit: float) -> float:
    """Scale the gradients to a total norm of at most `limit`; return the norm before."""
    return float(nn.utils.clip_grad_norm_(parameters, limit, foreach=True))


def fit(
    stage: Stage,
    folder: Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    resume: bool = True,
    hold: float = 0.0,
    save_every_seconds: float = 120,
    measure_every_seconds: float = 300,
) -> int:
    """Train until the budget is spent, counting the time of earlier parts of a resumed run. Return the steps made.

    The learning rate follows the spent part of the budget; give `steps` where a run must be repeatable bit by bit.
    Writes folder/checkpoint.pt and folder/log.jsonl, with what `stage.measure` finds, where a stage has that.
    """
    if (minutes is None) == (steps is None):
        raise ValueError(f"Training budget: got minutes {minutes} and steps {steps}, expected exactly one. Give one.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    number, spent = 0, 0.0
    if resume and path.exists():
        check_pth(path)
        state = torch.load(path, weights_only=True)
        stage.load_state_dict(state["stage"])
        number, spent = state["step"], state["seconds"]
        logger.info("resumed %s at step %d after %.0f s", folder.name, number, spent)

    def save() -> None:
        state = {"stage": stage.state_dict(), "step": number, "seconds": spent}
        write_atomically(path, lambda temporary: torch.save(state, temporary))

    total = steps if steps is not None else round(minutes * 60)
    measure = getattr(stage, "measure", dict)
    last_save = last_measure = tick = time.monotonic()
    with tqdm(total=total, initial=number if steps else round(spent), unit="step" if steps else "s") as bar:
        while (progress := (number / steps if steps else spent / (minutes * 60))) < 1:
            metrics = stage.step(number, cosine_factor(progress, hold), progress)
            number += 1
            now = time.monotonic()
            spent, tick = spent + now - tick, now
            bar.update((number if steps else round(spent)) - bar.n)
            bar.set_postfix({"step": number, **{key: f"{value:.4g}" for key, value in metrics.items()}}, refresh=False)
            if now - last_measure > measure_every_seconds:
                metrics |= measure()
                last_measure = now
            if number % 20 == 0 or last_measure == now:
                with (folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps({"step": number, "seconds": round(spent, 1), **metrics}) + "\n")
            if now - last_save > save_every_seconds:
                save()
                last_save = now
    save()
    return number
