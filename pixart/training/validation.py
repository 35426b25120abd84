"""Pictures of fixed prompts and seeds while a training runs, and the strip that they grow into."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import LATENT_DOWNSCALE
from ..drawing.strips import join_column, join_row, label_above, label_columns
from ..files.atomic import write_atomically
from ..sampling import Captions, Settings, sample_latents
from ..weights.reading import require_file
from .objectives import ControlPrediction, Distillation, DistributionMatching, Objective

logger = logging.getLogger(__name__)

Decode = Callable[[Tensor], Tensor]  # unscaled latents (B, 4, h, w) -> pictures (B, H, W, 3) in [0, 1]
FOLDER = "samples"
_PATTERN = re.compile(r"step-(\d+)\.png")
_MAX_STRIP_ROWS = 12


@dataclass(frozen=True)
class ValidationPrompt:
    """One picture to make again and again.

    caption: (L, D) T5 states without padding. size_latent: (h, w). hint: (4, h, w) unscaled latent of a control
    picture, or None. text: the prompt, as a label.
    """

    caption: Tensor
    size_latent: tuple[int, int]
    hint: Tensor | None = None
    text: str = ""


class Validation:
    """Makes the pictures of a step with the objective's current weights, and keeps them in folder/samples.

    show: called with the pictures of a step as one row. is_main: False only takes part in the computing, as each of
    the processes does that share the weights.
    """

    def __init__(
        self,
        objective: Objective,
        prompts: Sequence[ValidationPrompt],
        folder: Path,
        decode: Decode,
        show: Callable[[Image.Image], None] | None = None,
        is_main: bool = True,
    ):
        self.objective, self.prompts, self.decode = objective, list(prompts), decode
        self.folder, self.show, self.is_main = Path(folder) / FOLDER, show, is_main

    def __call__(self, step: int) -> Image.Image | None:
        """Make, keep and show the pictures of a step, which come back as one row; None where not is_main."""
        row = self.row()
        if row is None:
            return None
        path = self.folder / f"step-{step:08d}.png"
        try:
            write_atomically(path, lambda temporary: row.save(temporary, "PNG"))
        except OSError as error:  # a full disk costs pictures, not the training
            logger.warning("The validation pictures of step %d are not kept: %s", step, error)
        if self.show is not None:
            self.show(row)
        return row

    def row(self) -> Image.Image | None:
        """The pictures of the weights as they are, side by side; None where not is_main."""
        latents = [self.objective.within(self._latent, prompt, index) for index, prompt in enumerate(self.prompts)]
        if not self.is_main:
            return None
        return join_row([to_image(self.decode(latent)[0]) for latent in latents])

    def _latent(self, prompt: ValidationPrompt, index: int) -> Tensor:
        """The latent of one prompt, (1, 4, h, w) fp32, not scaled; its noise depends on the prompt's place alone."""
        objective, settings = self.objective, self.objective.settings
        device, model = self._device, objective.model
        caption = prompt.caption[None].to(device, objective.dtype)
        mask = torch.ones(caption.shape[:2], dtype=torch.bool, device=device)
        sampling = Settings(steps=settings.sample_steps, guidance=settings.sample_guidance)
        if isinstance(objective, Distillation):
            sampling = Settings("lcm", "lcm", steps=settings.sample_steps, guidance=1.0)
        elif isinstance(objective, DistributionMatching):
            sampling = Settings("dmd", "dmd", steps=1, guidance=1.0)
        elif objective.null_caption is None:
            sampling = Settings(steps=settings.sample_steps, guidance=1.0)
        positive = negative = Captions(caption, mask)
        if sampling.guidance != 1:
            negative = Captions(*objective.without_caption(caption, mask))
        height, width = (side * LATENT_DOWNSCALE for side in prompt.size_latent)
        with torch.autocast(device.type, objective.dtype, enabled=objective.autocast):
            called = _Controlled(objective, prompt, device) if isinstance(objective, ControlPrediction) else model
            seeds = [settings.sample_seed + index]
            latent = sample_latents(called, positive, negative, height, width, seeds, sampling)
        return latent.float()

    @property
    def _device(self) -> torch.device:
        return next(self.objective.parameters()).device

    def strip(self) -> Image.Image | None:
        """The pictures of all steps under their prompts, a row each with its step, or None before the first."""
        found = sorted((int(_PATTERN.fullmatch(path.name)[1]), path) for path in self.folder.glob("step-*.png"))
        if not found:
            return None
        stride = max(1, -(-(len(found) - 1) // (_MAX_STRIP_ROWS - 1)))
        chosen = [*found[:-1:stride], found[-1]]  # evenly, and always the last
        rows = []
        for step, path in chosen:
            with Image.open(path) as row:
                rows.append(label_above(row.convert("RGB"), f"step {step}"))
        texts = [prompt.text for prompt in self.prompts]
        return join_column([*([label_columns(rows[0].width, texts)] if any(texts) else []), *rows])


class _Controlled:
    """A model under its ControlNet, called like the model alone."""

    def __init__(self, objective: ControlPrediction, prompt: ValidationPrompt, device):
        if prompt.hint is None:
            raise ValueError(
                "Validation prompt has no control picture: got a caption alone, expected one with its hint. Take the "
                "validation pictures from a dataset that was encoded with control pictures."
            )
        self.objective, self.config = objective, objective.model.config
        hint = prompt.hint[None].to(device).float() * self.config.vae_scale
        self.hint = hint.to(objective.dtype)

    def __call__(self, latent, *args):
        hint = self.hint.expand(len(latent), -1, -1, -1)
        model = self.objective.model
        return model(latent, *args, control=self.objective.control.attach(model, hint))


def write_prompts(path: Path, prompts: Sequence[ValidationPrompt]) -> None:
    """Keep prompts in a safetensors file, for trainings outside a graph."""
    tensors, texts = {}, {}
    for index, prompt in enumerate(prompts):
        tensors[f"{index}.caption"] = prompt.caption.detach().cpu().contiguous().clone()
        tensors[f"{index}.size_latent"] = torch.tensor(prompt.size_latent)
        if prompt.hint is not None:
            tensors[f"{index}.hint"] = prompt.hint.detach().cpu().contiguous().clone()
        texts[f"{index}.text"] = prompt.text
    write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata=texts))


def read_prompts(path: Path) -> list[ValidationPrompt]:
    """The prompts of write_prompts. Raises FileNotFoundError, and ValueError for what is no regular file."""
    require_file(path)
    with safe_open(path, framework="pt") as file:
        names, texts = list(file.keys()), file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in names}
    count = sum(name.endswith(".caption") for name in names)
    return [
        ValidationPrompt(
            tensors[f"{index}.caption"],
            tuple(tensors[f"{index}.size_latent"].tolist()),
            tensors.get(f"{index}.hint"),
            texts.get(f"{index}.text", ""),
        )
        for index in range(count)
    ]


def to_image(picture: Tensor) -> Image.Image:
    """(H, W, 3) in [0, 1] -> a picture."""
    values = picture.detach().float().nan_to_num().clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
    return Image.fromarray(numpy.asarray(values))
