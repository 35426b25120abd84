"""What a training tells: a log in lines of JSON, the curve of its loss, TensorBoard and Weights & Biases."""

import importlib.util
import json
import logging
import math
import secrets
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..drawing.lettering import load_font
from ..tracking.weights_and_biases import open_run, usual_mode
from ..weights.atomic import write_atomically
from .settings import TrainingSettings, settings_to_dict

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
SMOOTHING_STEPS = 50
_TIMED_STEPS = 20
_FONT_PX = 12
_PAPER, _GRID, _INK, _FAINT, _LINE = (255, 255, 255), (225, 225, 225), (60, 60, 60), (176, 205, 235), (31, 97, 172)


class Report:
    """The log of one training, in its folder; only the main process writes.

    settings: of the run, as plain values. losses: (step, loss) of every logged step so far.
    """

    def __init__(self, folder: Path, settings: TrainingSettings, is_main: bool = True):
        self.folder, self.is_main, self.every = Path(folder), is_main, settings.log_every
        self.settings = settings_to_dict(settings)
        self.losses: list[tuple[int, float]] = []
        self.smoothed: float | None = None
        self._times: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._file = self._board = self._wandb = None

    def start(self, step: int) -> None:
        """Open the log, cut to what happened up to `step`."""
        if not self.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LOG
        kept = [entry for entry in read_log(path) if entry["step"] <= step]
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        for entry in kept:
            self._follow(entry["step"], entry["loss"])
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a line is there once it is written
        self._open_trackers(step)

    def log(self, step: int, loss: float, error: float, norm: float, rate: float, seconds: float) -> float:
        """Write down one step; returns the smoothed loss."""
        self._times.append(seconds)
        self._follow(step, loss)
        if self._file is not None and step % self.every == 0:
            numbers = {"loss": loss, "error": error, "gradient_norm": norm, "learning_rate": rate}
            entry = {"step": step, **numbers, "smoothed": self.smoothed, "seconds": round(seconds, 4)}
            try:
                self._file.write(json.dumps(entry) + "\n")
            except OSError as warning:  # a full disk costs lines of the log, not the training
                logger.warning("Line of the log is lost: %s", warning)
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

            self._board.add_image(name, numpy.asarray(image), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Close the log; may be called twice."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._board = self._wandb = None

    def _follow(self, step, loss):
        self.losses.append((step, loss))
        rate = max(1 / SMOOTHING_STEPS, 1 / len(self.losses))
        self.smoothed = loss if self.smoothed is None else self.smoothed + rate * (loss - self.smoothed)

    def _open_trackers(self, step):
        if self.settings["tensorboard"] and not importlib.util.find_spec("tensorboard"):
            logger.info("There is no log for TensorBoard: its package, tensorboard, is not installed")
        elif self.settings["tensorboard"]:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
            self._board.add_text("settings", f"```\n{json.dumps(self.settings, indent=2)}\n```", step)
        if self.settings["wandb"]:
            self._wandb = _open_wandb(self.folder, self.settings)

    def _track(self, step, numbers):
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)


def _open_wandb(folder: Path, settings: dict):
    # The run's own file remembers its id, so that a continued training continues its charts.
    marker = folder / "wandb_id.txt"
    known = marker.read_text(encoding="utf-8").strip() if marker.is_file() else secrets.token_hex(4)
    run = open_run(folder, usual_mode(), id=known, resume="allow", config=settings)
    marker.write_text(known, encoding="utf-8")
    return run


def read_log(path: Path) -> list[dict]:
    """The entries of a log; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            logger.warning("A broken line of %s is left out", path)
    return entries


def draw_curve(losses: Sequence[tuple[int, float]], size: tuple[int, int] = (768, 384)) -> Image.Image:
    """Losses by step as a picture: each one faint, and smoothed over 2 % of them."""
    image = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(image), load_font(_FONT_PX)
    points = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    if not points:
        draw.text((size[0] // 2, size[1] // 2), "no loss yet", _INK, font, "mm")
        return image
    box = (64, 16, size[0] - 16, size[1] - 36)  # left, top, right, bottom
    smooth = _smooth(points, max(1, len(points) // 50))
    # Single losses reach far beyond their course: the axis ends above nine in ten of them.
    ordered = sorted(loss for _, loss in points)
    high = max(max(loss for _, loss in smooth), ordered[int(0.9 * (len(ordered) - 1))]) * 1.1 or 1.0
    steps = (points[0][0], max(points[-1][0], points[0][0] + 1))

    def place(point):
        x = box[0] + (point[0] - steps[0]) / (steps[1] - steps[0]) * (box[2] - box[0])
        return x, box[3] - min(max(point[1], 0) / high, 1) * (box[3] - box[1])

    for share in range(5):
        y = box[3] - share / 4 * (box[3] - box[1])
        draw.line((box[0], y, box[2], y), fill=_GRID)
        draw.text((box[0] - 6, y), f"{high * share / 4:.3g}", _INK, font, "rm")
        step = steps[0] + share / 4 * (steps[1] - steps[0])
        x = box[0] + share / 4 * (box[2] - box[0])
        draw.text((x, box[3] + 4), f"{step:.0f}", _INK, font, "mt")
    text = f"step; loss {points[-1][1]:.4g}, smoothed {smooth[-1][1]:.4g}"
    draw.text((box[0], size[1] - 4), text, _INK, font, "ls")
    thin = points[:: max(1, len(points) // (4 * size[0]))]
    for course, colour, width in ((thin, _FAINT, 1), (smooth, _LINE, 3)):
        places = [place(point) for point in course]
        draw.line(places if len(places) > 1 else places * 2, fill=colour, width=width, joint="curve")
    return image


def _smooth(points, width):
    """Means over windows of 2 * width + 1 points, at about 500 of them."""
    totals = [0.0]
    for _, loss in points:
        totals.append(totals[-1] + loss)
    found = []
    for index in range(0, len(points), max(1, len(points) // 500)):
        low, high = max(0, index - width), min(len(points), index + width + 1)
        found.append((points[index][0], (totals[high] - totals[low]) / (high - low)))
    return found
