"""What a training reports: a log in lines of JSON, the curve of its loss, TensorBoard and Weights & Biases."""

import contextlib
import importlib.util
import json
import logging
import secrets
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..drawing.curves import draw_curve
from ..files.atomic import write_atomically
from ..files.documents import parse_json
from ..quoting import plain
from ..tracking.weights_and_biases import describe_mode, open_run, usual_mode
from .settings import TrainingSettings, settings_to_dict

logger = logging.getLogger(__name__)

LOG, BOARD, WANDB = "log.jsonl", "TensorBoard", "Weights & Biases"
SMOOTHING_STEPS = 50
_TIMED_STEPS = 20


class Report:
    """The log of one training, in its folder; only the main process writes.

    settings: of the run, as plain values. losses: (step, loss) of every logged step so far. notes: what could not be
    logged, once for each place; no trouble with a log ends a training.
    """

    def __init__(self, folder: Path, settings: TrainingSettings, is_main: bool = True):
        self.folder, self.is_main, self.every = Path(folder), is_main, settings.log_every
        self.settings = settings_to_dict(settings)
        self.losses: list[tuple[int, float]] = []
        self.smoothed: float | None = None
        self._times: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._file = self._board = self._wandb = None
        self.notes: list[str] = []

    def start(self, step: int) -> None:
        """Open the log, cut to what happened up to `step`."""
        if not self.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_log(self.folder / LOG) if _is_step(entry) and entry["step"] <= step]
        for entry in kept:
            self._follow(entry["step"], entry["loss"])
        with self._going_on(LOG):
            self._file = _open_log(self.folder / LOG, kept)
        self._open_trackers(step)

    def log(self, step: int, loss: float, error: float, norm: float, rate: float, seconds: float) -> float:
        """Write down one step; returns the smoothed loss."""
        self._times.append(seconds)
        self._follow(step, loss)
        if self._file is not None and step % self.every == 0:
            numbers = {"loss": loss, "error": error, "gradient_norm": norm, "learning_rate": rate}
            entry = {"step": step, **numbers, "smoothed": self.smoothed, "seconds": round(seconds, 4)}
            with self._going_on(LOG):
                self._file.write(json.dumps(entry) + "\n")
        if step % self.every == 0 and self.is_main:
            numbers = {"loss": loss, "error": error, "gradient_norm": norm, "learning_rate": rate}
            self._track(step, {**numbers, "smoothed": self.smoothed})
        return self.smoothed

    @property
    def seconds_per_step(self) -> float:
        """Over the last steps."""
        return sum(self._times) / max(len(self._times), 1)

    def curve(self, size: tuple[int, int] = (768, 384)) -> Image.Image:
        """The loss over the steps, faint, and its smoothed course."""
        return draw_curve(self.losses, size)

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
        self.losses.append((step, loss))
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


def _is_step(entry) -> bool:
    """Whether a line of a log is of a step; other programs may have added theirs."""
    numbers = [entry.get(name) for name in ("step", "loss")] if isinstance(entry, dict) else [None]
    return all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)


def _open_log(path: Path, kept: list[dict]):
    text = "".join(json.dumps(entry) + "\n" for entry in kept)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path.open("a", encoding="utf-8", buffering=1)  # a line is there once it is written


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
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entries.append(parse_json(line))
        except ValueError:
            logger.warning("A broken line of %s is left out", path)
    return entries
