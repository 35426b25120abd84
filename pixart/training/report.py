"""What a training reports: a log in lines of JSON, the curve of its loss, TensorBoard and Weights & Biases."""

import contextlib
import importlib.util
import json
import logging
import os
import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from ..drawing.bars import draw_bars
from ..drawing.curves import draw_curve
from ..files.atomic import write_atomically
from ..files.documents import parse_json
from ..quoting import plain
from ..tracking.weights_and_biases import describe_mode, open_run, usual_mode
from .settings import TrainingSettings, settings_to_dict
from .watching.timesteps import LABELS, ByTimestep

logger = logging.getLogger(__name__)

LOG, BOARD, WANDB = "log.jsonl", "TensorBoard", "Weights & Biases"
VALIDATION, BY_TIMESTEP = "validation_loss", "error_by_timestep"  # names in logs
SMOOTHING_STEPS = 50
_TIMED_STEPS = 20


_MOST_POINTS = 8192  # ten to a pixel of the curve


class Course:
    """Losses by step. Beyond so many points two neighbours become one, so that no training is too long for it."""

    def __init__(self, state: Mapping | None = None):
        state = state or {"points": torch.zeros(0, 2), "open": [0.0, 0.0, 0], "stride": 1, "count": 0}
        self._points: list[tuple[float, float]] = [tuple(point) for point in state["points"].tolist()]
        self._open = list(state["open"])  # sums of steps and losses, and of how many, that are to be one point
        self._stride, self._count = state["stride"], state["count"]

    def add(self, step: int, loss: float) -> None:
        """Take in the next one."""
        self._count += 1
        self._open = [self._open[0] + step, self._open[1] + loss, self._open[2] + 1]
        if self._open[2] < self._stride:
            return
        self._points += self._pending()
        self._open = [0.0, 0.0, 0]
        if len(self._points) == _MOST_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [tuple((a + b) / 2 for a, b in zip(*pair, strict=True)) for pair in pairs]
            self._stride *= 2

    def _pending(self) -> list[tuple[float, float]]:
        steps, losses, count = self._open
        return [(steps / count, losses / count)] if count else []

    def points(self) -> list[tuple[float, float]]:
        """(step, loss) of each, or their means over as many steps as make a point."""
        return [*self._points, *self._pending()]

    def __len__(self) -> int:
        """How many losses were taken in."""
        return self._count

    def state(self) -> dict:
        """What makes the same again, for a checkpoint."""
        points = torch.tensor(self._points, dtype=torch.float64).reshape(-1, 2)
        return {"points": points, "open": self._open, "stride": self._stride, "count": self._count}


class Report:
    """The log of one training, in its folder; only the main process writes.

    settings: of the run, as plain values. losses: the course of the loss so far. validations: of the validation loss.
    timesteps: errors by timestep. notes: what could not be logged, once for each place; no trouble with a log ends a
    training.
    """

    def __init__(self, folder: Path, settings: TrainingSettings, is_main: bool = True):
        self.folder, self.is_main, self.every = Path(folder), is_main, settings.log_every
        self.settings = settings_to_dict(settings)
        self.losses, self.validations, self.timesteps = Course(), Course(), ByTimestep()
        self.smoothed: float | None = None
        self._times: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._pending: dict[str, object] = {}  # numbers of a step that is not written yet
        self._file = self._board = self._wandb = None
        self.notes: list[str] = []

    def start(self, step: int, state: Mapping | None = None) -> None:
        """Open the log, cut to what happened up to `step`.

        state: this report's at that step; without it the log is read from its beginning.
        """
        if not self.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LOG
        with self._going_on(LOG):
            if state and _ends_a_line(path, state["log_bytes"]):
                os.truncate(path, state["log_bytes"])
                self.losses, self.smoothed = Course(state["losses"]), state["smoothed"]
                self.validations = Course(state.get("validations"))
                self.timesteps = ByTimestep(state.get("timesteps"))
            else:
                write_atomically(path, lambda temporary: self._copy_log(path, temporary, step))
            self._file = path.open("a", encoding="utf-8", buffering=1)  # a line is there once it is written
        self._open_trackers(step)

    def _copy_log(self, path: Path, copy: Path, step: int) -> None:
        with copy.open("w", encoding="utf-8") as file:
            for entry in iterate_log(path):
                if not _is_of_step(entry) or entry["step"] > step:
                    continue
                if _is_of_step(entry, VALIDATION):
                    self.validations.add(entry["step"], entry[VALIDATION])
                elif not _is_of_step(entry, "loss"):
                    continue
                if _is_of_step(entry, "loss"):
                    self._follow(entry["step"], entry["loss"])
                file.write(json.dumps(entry) + "\n")

    def state(self) -> dict | None:
        """How far the log is, for a checkpoint: with it nobody needs to read it again. None where there is none."""
        if self._file is None:
            return None
        size = os.fstat(self._file.fileno()).st_size
        return {
            "log_bytes": size,
            "smoothed": self.smoothed,
            "losses": self.losses.state(),
            "validations": self.validations.state(),
            "timesteps": self.timesteps.state(),
        }

    def log(
        self,
        step: int,
        loss: float,
        error: float,
        norm: float,
        rate: float,
        seconds: float,
        more: Mapping[str, float] | None = None,
    ) -> float:
        """Write down one step, and further numbers of it; returns the smoothed loss."""
        self._times.append(seconds)
        self._follow(step, loss)
        pending, self._pending = self._pending, {}
        numbers = {"loss": loss, "error": error, "gradient_norm": norm, "learning_rate": rate}
        numbers |= {"smoothed": self.smoothed}
        if step % self.every == 0 or pending:
            self._write({"step": step, **numbers, "seconds": round(seconds, 4), **(more or {}), **pending})
        if step % self.every == 0:
            self._track(step, {**numbers, **(more or {})})
        return self.smoothed

    def validate(self, step: int, loss: float, errors: Sequence[float | None]) -> None:
        """Take in a validation: its loss, and its errors by timestep, None where there are none.

        It is written with the step's own numbers; before the first step alone.
        """
        self.validations.add(step, loss)
        self._pending |= {VALIDATION: loss, f"validation_{BY_TIMESTEP}": list(errors)}
        if step == 0:
            self._write({"step": step, **self._pending})
            self._pending = {}
        self._track(step, {VALIDATION: loss, **_named(f"validation_{BY_TIMESTEP}", errors)})

    def close_timesteps(self, step: int) -> None:
        """Take in that a stretch ends with this step, whose errors by timestep are written with its numbers."""
        means = self.timesteps.close()
        if means:
            self._pending |= {BY_TIMESTEP: means}
            self._track(step, _named(BY_TIMESTEP, means))

    def _write(self, entry: dict):
        if self._file is not None:
            with self._going_on(LOG):
                self._file.write(json.dumps(entry) + "\n")

    @property
    def seconds_per_step(self) -> float:
        """Over the last steps."""
        return sum(self._times) / max(len(self._times), 1)

    def curve(self, size: tuple[int, int] = (768, 384)) -> Image.Image:
        """The loss over the steps, faint, and its smoothed course."""
        return draw_curve(self.losses.points(), size, validations=self.validations.points())

    def timestep_bars(self) -> Image.Image | None:
        """The errors by timestep of the first stretch of steps and of the last; None before the first."""
        last = self.timesteps.means() or self.timesteps.last
        if last is None:
            return None
        return draw_bars(LABELS, {"first steps": self.timesteps.first or last, "last steps": last})

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Hand a picture to TensorBoard and Weights & Biases."""
        if self._board is not None:
            import numpy

            with self._going_on(BOARD):
                self._board.add_image(name, numpy.asarray(image), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            with self._going_on(WANDB):
                self._wandb.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Close the log; may be called twice."""
        for place, end in (
            (LOG, self._file and self._file.close),
            (BOARD, self._board and self._board.close),
            (WANDB, self._wandb and self._wandb.finish),
        ):
            if end:
                with self._going_on(place):
                    end()
        self._file = self._board = self._wandb = None

    @contextlib.contextmanager
    def _going_on(self, place: str) -> Iterator[None]:
        """What a log raises within, whatever it is, costs entries of that log and not the training."""
        try:
            yield
        except Exception as error:
            note = f"entries of {place} are lost ({plain(str(error), 200)})"
            if not any(each.startswith(f"entries of {place} ") for each in self.notes):
                logger.warning("PixArt training: %s", note)
                self.notes.append(note)
            if place == BOARD:  # its thread is dead, and each further entry would say so
                self._board = None

    def _follow(self, step, loss):
        self.losses.add(step, loss)
        rate = max(1 / SMOOTHING_STEPS, 1 / len(self.losses))
        self.smoothed = loss if self.smoothed is None else self.smoothed + rate * (loss - self.smoothed)

    def _open_trackers(self, step):
        if self.settings["tensorboard"] and not importlib.util.find_spec("tensorboard"):
            logger.info("There is no log for TensorBoard: its package, tensorboard, is not installed")
        elif self.settings["tensorboard"]:
            from torch.utils.tensorboard import SummaryWriter

            with self._going_on(BOARD):
                self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
                self._board.add_text("settings", f"```\n{json.dumps(self.settings, indent=2)}\n```", step)
        if self.settings["wandb"]:
            self._wandb = _open_wandb(self.folder, self.settings)

    def _track(self, step, numbers):
        if self._board is not None:
            with self._going_on(BOARD):
                for name, value in numbers.items():
                    self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            with self._going_on(WANDB):
                self._wandb.log(numbers, step=step)


def _is_of_step(entry, *names: str) -> bool:
    """Whether a line of a log is of a step and has these numbers; other programs may have added theirs."""
    numbers = [entry.get(name) for name in ("step", *names)] if isinstance(entry, dict) else [None]
    return all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)


def _named(name: str, errors: Sequence[float | None]) -> dict[str, float]:
    return {f"{name}/{label}": error for label, error in zip(LABELS, errors, strict=True) if error is not None}


def _ends_a_line(path: Path, size: int) -> bool:
    """Whether a log has that many bytes, the last of which ends a line."""
    if not path.is_file() or path.stat().st_size < size:
        return False
    with path.open("rb") as file:
        file.seek(max(size - 1, 0))
        return size == 0 or file.read(1) == b"\n"


def _open_wandb(folder: Path, settings: dict):
    # The run's own file remembers its id, so that a continued training continues its charts.
    marker = folder / "wandb_id.txt"
    known = marker.read_text(encoding="utf-8").strip() if marker.is_file() else secrets.token_hex(4)
    mode = usual_mode()
    run = open_run(folder, mode, id=known, resume="allow", config=settings)
    logger.info("%s", describe_mode(mode, str(folder)))  # it may differ from what an account of the user suggests
    marker.write_text(known, encoding="utf-8")
    return run


def read_log(path: Path) -> list[dict]:
    """The entries of a log; a last line that was cut off by a kill is left out."""
    return list(iterate_log(path))


def iterate_log(path: Path) -> Iterator[dict]:
    """The same, one after the other."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield parse_json(line)
            except ValueError:
                logger.warning("A broken line of %s is left out", path)
