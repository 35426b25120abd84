"""What a training node shows while it runs: the curve, pictures, time, speed and memory."""

import time

import comfy.model_management
import comfy.utils
import torch
from PIL import Image

from ....pixart.drawing.curves import draw_curve
from ....pixart.training.loop import Events, Progress
from ....pixart.training.report import Course
from ....pixart.training.settings import TrainingSettings
from ..text.captions import show_text

# As wide as nodes are drawn, or little more, so that its letters can be read there.
_CURVE_PX, _LETTER_PX = (400, 230), 15
_PICTURES_PX = 150  # the height of the validation pictures under it
_PREVIEW_PX = 512  # the longer side that is sent
_PREVIEW_EVERY_S, _TEXT_EVERY_S = 2.0, 0.5


class TrainingView(Events):
    """Progress, time left and previews on the node; the host's interruption ends the training.

    hidden: the node's hidden inputs. device: that the training runs on, whose memory is shown.
    """

    interruptions = (comfy.model_management.InterruptProcessingException,)  # the VAE's layers raise it, too

    def __init__(self, settings: TrainingSettings, hidden, device: torch.device):
        self.bar = comfy.utils.ProgressBar(settings.steps)
        self.hidden, self.device = hidden, device
        self.pictures_per_step = settings.batch_size * settings.accumulation
        self.losses, self.validations = Course(), Course()
        self.pictures: Image.Image | None = None
        self.shown_at = self.told_at = 0.0
        self.is_interrupted = False

    def stepped(self, progress: Progress) -> None:
        now = time.monotonic()
        is_last = progress.step == progress.steps
        self.losses.add(progress.step, progress.loss)
        if progress.validation is not None and progress.validation not in self.validations.points()[-1:]:
            self.validations.add(*progress.validation)
        preview = None
        if now - self.shown_at >= _PREVIEW_EVERY_S or is_last:
            preview, self.shown_at = ("JPEG", self._picture(), _PREVIEW_PX), now
        try:
            self.bar.update_absolute(progress.step, progress.steps, preview)
        except comfy.model_management.InterruptProcessingException:  # the bar met it first, and took it back
            self.is_interrupted = True
        if now - self.told_at >= _TEXT_EVERY_S or is_last:
            self.told_at = now
            show_text(self.hidden, describe_progress(progress, self.pictures_per_step, describe_memory(self.device)))

    def interrupted(self) -> None:
        self.is_interrupted = True

    def should_stop(self) -> bool:
        return self.is_interrupted or comfy.model_management.processing_interrupted()

    def show_pictures(self, pictures: Image.Image) -> None:
        """Validation pictures, under the curve from now on."""
        self.pictures, self.shown_at = pictures, 0.0

    def _picture(self) -> Image.Image:
        curve = draw_curve(self.losses.points(), _CURVE_PX, _LETTER_PX, self.validations.points())
        if self.pictures is None:
            return curve
        scale = min(curve.width / self.pictures.width, _PICTURES_PX / self.pictures.height)
        size = (round(self.pictures.width * scale), round(self.pictures.height * scale))
        both = Image.new("RGB", (curve.width, curve.height + size[1]), (255, 255, 255))
        both.paste(curve, (0, 0))
        both.paste(self.pictures.resize(size), ((curve.width - size[0]) // 2, curve.height))
        return both


def describe_progress(progress: Progress, pictures_per_step: int, memory: str) -> str:
    """Two lines, short enough for a node: step and time left; loss, speed and memory. A third one of validations."""
    speed = pictures_per_step / max(progress.seconds_per_step, 1e-6)
    number = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
    validated = ""
    if progress.validation is not None:
        validated = f"\nvalidation {progress.validation[1]:.4f}, best {progress.best[1]:.4f} at {progress.best[0]}"
    return (
        f"step {progress.step} of {progress.steps}, {describe_seconds(progress.seconds_left)} left\n"
        f"loss {progress.smoothed:.4f}, {number} pictures/s, {memory}{validated}"
    )


def describe_seconds(seconds: float) -> str:
    """As 3 h 07 min, 4 min 10 s, or 8 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


def describe_memory(device: torch.device) -> str:
    """How much of a device's memory is taken, by all programs."""
    total = comfy.model_management.get_total_memory(device)
    taken = total - comfy.model_management.get_free_memory(device)
    return f"{taken / 2**30:.1f}/{total / 2**30:.0f} GB"
