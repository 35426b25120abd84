"""One training from a model, features and settings to files: what the graph's nodes and the command line share."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..saving import write_atomically
from ..transformer import PixArt
from .build import make_objective
from .examples import FeatureSet
from .loop import Events, Trainer
from .objectives import Objective
from .processes import SingleProcess
from .results import save_result
from .settings import TrainingSettings
from .validation import Decode, Validation, ValidationPrompt

RESULT = "result.json"  # in a run's folder, once its result is written: the steps that it has, and where it is


@dataclass(frozen=True)
class TrainingResult:
    """What a training leaves behind.

    step: how many are done; fewer than asked for when it was stopped. weights: of the trained parameters, on the CPU.
    file: the result. curve: of the loss. strip: validation pictures, or None.
    """

    objective: Objective
    weights: dict[str, Tensor]
    step: int
    file: Path
    curve: Image.Image
    strip: Image.Image | None


def train(
    model: PixArt,
    features: FeatureSet,
    settings: TrainingSettings,
    folder: Path,
    *,
    resume: bool = True,
    processes: SingleProcess | None = None,
    events: Events | None = None,
    prompts: Sequence[ValidationPrompt] = (),
    decode: Decode | None = None,
    show: Callable[[Image.Image], None] | None = None,
    file: Path | None = None,
) -> TrainingResult:
    """Train, and write the result, loss.png, samples.png, log.jsonl, result.json and checkpoints into the folder.

    The model becomes part of the objective and is changed. prompts with decode: validation pictures, which `show`
    gets too. file: of the result; None is folder/<folder's name>.safetensors.
    Raises ValueError for data and settings that do not fit, before the first step.
    """
    check_features(features, model, settings)
    processes = processes or SingleProcess()
    folder = Path(folder)
    objective = make_objective(model, settings, processes.device, features.null_caption)
    trainer = Trainer(objective, features, settings, folder, processes, events)
    validation = None
    if prompts and decode is not None and settings.sample_every:
        is_main = processes.rank == 0
        validation = Validation(objective, prompts, folder, decode, trainer.report, show, is_main)
        trainer.sample = validation
    step = trainer.run(resume)
    weights = trainer.trained_weights()
    file, strip = file or folder / f"{folder.name}.safetensors", None
    curve = trainer.report.curve()
    if processes.rank == 0:
        try:
            save_result(file, objective, weights, settings)
        except OSError as error:
            raise OSError(
                error.errno,
                f"Result cannot be written: got '{error.strerror or error}', expected a writable disk with space. "
                f"Nothing is lost: free some space and start the training again, it will only write the result",
                str(file),
            ) from error
        curve.save(folder / "loss.png")
        strip = validation.strip() if validation else None
        if strip is not None:
            strip.save(folder / "samples.png")
        mark = json.dumps({"step": step, "file": str(file)})
        write_atomically(folder / RESULT, lambda temporary: temporary.write_text(mark, encoding="utf-8"))
    processes.wait()
    return TrainingResult(objective, weights, step, file, curve, strip)


def check_features(features: FeatureSet, model: PixArt, settings: TrainingSettings) -> None:
    """Raises ValueError for data that this model and these settings cannot be trained on."""
    if not len(features):
        raise ValueError("Empty dataset: got no pictures, expected at least one. Connect a dataset with pictures.")
    first, config = features[0], model.config
    if first.caption.shape[-1] != config.caption_channels:
        raise ValueError(
            f"Caption width mismatch: got {first.caption.shape[-1]}, expected {config.caption_channels}. Encode the "
            f"dataset with the T5 text encoder that this PixArt model was trained with."
        )
    if first.latent.shape[0] != config.in_channels:
        raise ValueError(
            f"Latent width mismatch: got {first.latent.shape[0]} channels, expected {config.in_channels}. Encode the "
            f"dataset with the VAE of this PixArt model."
        )
    if settings.kind == "controlnet" and first.hint is None:
        raise ValueError(
            "Control pictures are missing: got a dataset without them, expected one for each picture. Encode the "
            "dataset with a control method."
        )


def choose_folder(root: Path, name: str, resume: bool, steps: int) -> Path:
    """The folder of a run below root: the newest of that name without a result of `steps`, or a new one, numbered.

    resume: False is always a new one. Raises ValueError for a name that is no plain name.
    """
    check_name(name)
    pattern = re.compile(rf"{re.escape(name)}_(\d{{3,}})")
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    numbers = [int(found[1]) for path in folders if (found := pattern.fullmatch(path.name))]
    newest = max(numbers, default=0)
    unfinished = newest and _steps_of_result(root / f"{name}_{newest:03d}") < steps
    return root / f"{name}_{newest if resume and unfinished else newest + 1:03d}"


def _steps_of_result(folder: Path) -> int:
    """The steps behind the result of a run, 0 where none was written."""
    try:
        return int(json.loads((folder / RESULT).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def check_name(name: str) -> None:
    """Raises ValueError for a name that would lead out of its folder, or that some file system does not take."""
    if not re.fullmatch(r"[^\\/:*?\"<>|\x00-\x1f]{1,100}", name) or not name.strip(". ") or name != name.strip():
        raise ValueError(
            f"Name of the training cannot be used: got {name!r}, expected a plain name such as 'my_style' without "
            f"folders. Enter another one."
        )
