"""One training from a model, features and settings to files: what the graph's nodes and the command line share."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..data.examples import FeatureSet
from ..data.sketches import sketch_model
from ..files.atomic import write_atomically
from ..files.documents import load_json
from ..files.names import fault_of
from ..lora import Target, save_lora
from ..lora.kinds import LowRank
from ..quoting import plain, shorten
from ..transformer import PixArt
from ..weights.controlnets import save_controlnet
from ..weights.precision import DTYPES
from ..weights.saving import save_checkpoint
from .adapters import AdaptedLinear
from .build import make_objective
from .loop import Events, Trainer
from .objectives import ControlPrediction, Objective
from .processes import SingleProcess
from .settings import TrainingSettings, settings_to_dict
from .validation import Decode, Validation, ValidationPrompt

# In a run's folder, once its result is written: the steps that it has, where it is, and how often it was stopped early.
RESULT = "result.json"


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
    folder, base = Path(folder), sketch_model(model)
    objective = make_objective(model, settings, processes.device, features.null_caption)
    validation = None
    if prompts and decode is not None and settings.sample_every:
        validation = Validation(objective, prompts, folder, decode, show, is_main=processes.rank == 0)
    trainer = Trainer(objective, features, settings, folder, processes, events, validation, base)
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
                f"Result cannot be written: got {plain(error.strerror or error, 200)}, expected a "
                f"writable disk with space. Nothing is lost: free some space and start the training again, it will "
                f"only write the result",
                str(file),
            ) from error
        curve.save(folder / "loss.png")
        strip = validation.strip() if validation else None
        if strip is not None:
            strip.save(folder / "samples.png")
        stops = _number_in_result(folder, "stops") + (step < settings.steps)
        mark = json.dumps({"step": step, "file": str(file), "stops": stops})
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
    newest = max(_numbers_of_runs(root, name), default=0)
    unfinished = newest and _number_in_result(root / f"{name}_{newest:03d}", "step") < steps
    return root / f"{name}_{newest if resume and unfinished else newest + 1:03d}"


def count_stops(root: Path, name: str) -> int:
    """How often trainings of a name below root ended with fewer steps than they were asked for."""
    return sum(_number_in_result(root / f"{name}_{number:03d}", "stops") for number in _numbers_of_runs(root, name))


def _numbers_of_runs(root: Path, name: str) -> list[int]:
    pattern = re.compile(rf"{re.escape(name)}_(\d{{3,}})")
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return [int(found[1]) for path in folders if (found := pattern.fullmatch(path.name))]


def _number_in_result(folder: Path, key: str) -> int:
    """A number of the note beside a run's result, 0 where none was written."""
    try:
        return int(load_json(folder / RESULT)[key])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return 0


def check_name(name: str) -> None:
    """Raises ValueError for a name that would lead out of its folder, or that some file system does not take."""
    fault = fault_of(name)
    if fault is not None:
        raise ValueError(
            f"Name of the training cannot be used: got {shorten(name)}, which is {fault}, expected a plain name such "
            f"as 'my_style' without folders. Enter another one."
        )


SETTINGS_KEY = "pixart_training"  # in a file's header


def lora_factors(objective: Objective, weights: Mapping[str, Tensor]) -> dict[Target, LowRank]:
    """The adapters' changes by the rows that they change; q, k and v apart."""
    factors = {}
    for name, module in objective.model.named_modules():
        if isinstance(module, AdaptedLinear):
            given = {key: weights.get(f"model.{name}.{key}") for key in ("lora_down", "lora_up", "dora_scale")}
            factors |= _factors_of(name, module, **given)
    return factors


def _factors_of(name, module, lora_down, lora_up, dora_scale):
    factors = {}
    for part in range(module.parts):
        down, up = lora_down.chunk(module.parts)[part], lora_up.chunk(module.parts)[part]
        magnitude = None if dora_scale is None else dora_scale.chunk(module.parts)[part]
        target = Target(f"{name}.weight", part, module.parts)
        factors[target] = LowRank(down=down, up=up, alpha=module.scale * module.rank, magnitude=magnitude)
    return factors


def model_weights(objective: Objective, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole model in the original layout: trained weights, and what is never trained."""
    model = objective.model
    state = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    if model.has_null_caption:
        state["y_embedder.y_embedding"] = model.y_embedder.y_embedding.detach().to("cpu", torch.float32)
    return state


def control_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ControlNet under the original's names."""
    return {name.removeprefix("control."): tensor for name, tensor in weights.items()}


def save_result(path: Path, objective: Objective, weights: Mapping[str, Tensor], settings: TrainingSettings) -> None:
    """Write a `.safetensors` file of what was trained, whole or not at all, the settings in its header."""
    dtype = DTYPES[settings.save_dtype]
    texts = {SETTINGS_KEY: json.dumps(settings_to_dict(settings)), "pixart_objective": settings.kind}
    config = objective.model.config
    if settings.is_adapter:
        save_lora(path, lora_factors(objective, weights), metadata=texts, dtype=dtype)
    elif isinstance(objective, ControlPrediction):
        save_controlnet(path, control_weights(weights), config, dtype=dtype, metadata=texts)
    else:
        save_checkpoint(path, model_weights(objective, weights), config, dtype=dtype, metadata=texts)
