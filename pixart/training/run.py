"""One training from a model, features and settings to files: what the graph's nodes and the command line share."""

import contextlib
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..config import LATENT_DOWNSCALE, PixArtConfig
from ..data.buckets import Bins
from ..data.examples import FeatureSet
from ..data.sketches import sketch_model
from ..drawing.strips import join_column, label_above
from ..files.atomic import sweep, write_atomically
from ..files.documents import load_json
from ..files.locks import locked
from ..files.names import fault_of
from ..files.space import describe_room
from ..lora import Factor, LoRA, Target, save_lora
from ..quoting import plain, shorten
from ..transformer import PixArt
from ..weights.controlnets import save_controlnet
from ..weights.saving import DTYPES, save_checkpoint
from .adapters import AdaptedLinear
from .adapting.start import begin_with, identity_of, settings_of_start
from .build import make_objective
from .loop import Events, Trainer
from .objectives import ControlPrediction, Objective
from .processes import SingleProcess
from .settings import TrainingSettings, settings_to_dict
from .state import CHECKPOINTS
from .validation import FOLDER as SAMPLES
from .validation import Decode, Validation, ValidationPrompt
from .watching.best import read_best

logger = logging.getLogger(__name__)

LOCK = ".lock"  # in a run's folder: held by the process that trains there
# In a run's folder, once its result is written: the steps that it has, where it is, and how often it was stopped early.
RESULT = "result.json"


@dataclass(frozen=True)
class TrainingResult:
    """What a training leaves behind.

    step: how many are done; fewer than asked for when it was stopped. is_done: it was not stopped, but went on to its
    last step, or as far as its validation loss fell. weights: of the trained parameters, on the CPU.
    file: the result. curve: of the loss. strip: validation pictures, or None. notes: what the user is to hear.
    """

    objective: Objective
    weights: dict[str, Tensor]
    step: int
    file: Path
    curve: Image.Image
    strip: Image.Image | None
    notes: tuple[str, ...] = ()
    is_done: bool = True


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
    texts: Mapping[str, str] | None = None,
    start: LoRA | None = None,
    held_out: FeatureSet | None = None,
) -> TrainingResult:
    """Train, and write the result, loss.png, samples.png, log.jsonl, result.json and checkpoints into the folder.

    The model becomes part of the objective and is changed. prompts with decode: validation pictures, which `show`
    gets too. file: of the result; None is folder/<folder's name>.safetensors. texts: for its header.
    held_out: a set of its own for the validation loss, in place of a share of the features.
    start: a LoRA to begin with, whose rank, alpha and form then take the place of the settings' (see adapting.start).
    Raises ValueError for data and settings that do not fit, before the first step.
    """
    settings, told = settings_of_start(start, settings) if start else (settings, [])
    check_features(features, model, settings)
    processes, sizes = processes or SingleProcess(), describe_sizes(features, model.config)
    if processes.rank == 0:
        for line in sizes:
            logger.warning("PixArt training: %s", line)
    folder, base = Path(folder), sketch_model(model)
    objective = make_objective(model, settings, processes.device, features.null_caption)
    told += begin_with(objective.model, start) if start else []
    validation = None
    if prompts and decode is not None and settings.sample_every:
        validation = Validation(objective, prompts, folder, decode, show, is_main=processes.rank == 0)
    if held_out is not None:
        check_features(held_out, model, settings)
    trainer = Trainer(
        *(objective, features, settings, folder, processes, events, validation, base),
        start=start and identity_of(start),
        held_out=held_out,
    )
    file, strip = file or folder / f"{folder.name}.safetensors", None
    with _alone(folder, file) if processes.rank == 0 else contextlib.nullcontext():
        step = trainer.run(resume)
        weights = trainer.trained_weights()
        curve, notes = trainer.report.curve(), [*sizes, *told, *trainer.notes]
        if processes.rank == 0:
            file, more = write_result(file, folder, objective, weights, settings, texts)
            strip = validation.strip() if validation else None
            pictures = {"loss.png": curve, "samples.png": strip, "timesteps.png": trainer.report.timestep_bars()}
            notes += more + _write_best_beside(trainer, file, texts, pictures)
            done = settings.steps if trainer.has_ended_early else step
            notes += _write_beside(folder, settings, done, file, pictures)
        processes.wait()
    is_done = trainer.has_ended_early or step >= settings.steps
    return TrainingResult(objective, weights, step, file, curve, strip, tuple(notes), is_done)


@contextlib.contextmanager
def _alone(folder: Path, file: Path) -> Iterator[None]:
    """Within it no other process trains in the folder. What a killed one left half written there is removed.

    Raises ValueError while one does.
    """
    with locked(folder / LOCK) as is_ours:
        if not is_ours:
            raise ValueError(
                f"Training is running already: got {shorten(folder.name)}, into which another process writes, expected "
                f"a training of its own. Wait for its end, give this one another name, or turn resume off."
            )
        freed = sum(map(sweep, (folder, folder / CHECKPOINTS, folder / SAMPLES))) + sweep(file.parent, file.name)
        if freed:
            logger.info("%.1f MB that a killed training had left half written are removed", freed / 1e6)
        yield


def write_result(
    file: Path,
    folder: Path,
    objective: Objective,
    weights: Mapping[str, Tensor],
    settings: TrainingSettings,
    texts: Mapping[str, str] | None = None,
) -> tuple[Path, list[str]]:
    """Write what was trained to a file, or where that fails to the run's folder or the system's for temporary files.

    Returns (where it is, what to tell the user). Raises OSError, saying what is missing where, when no place takes it.
    """
    needed = sum(tensor.numel() for tensor in weights.values()) * DTYPES[settings.save_dtype].itemsize
    faults = []
    for place in dict.fromkeys((file, folder / file.name, None)):
        path = place or Path(tempfile.mkdtemp(prefix="pixart-")) / file.name
        try:
            save_result(path, objective, weights, settings, texts)
        except OSError as error:
            faults.append(f"{plain(str(error.strerror or error), 200)}: {describe_room(path, needed)}")
            logger.warning("The result could not be written: %s", faults[-1])
            first = error
            continue
        moved = f"the result is not in its place ({faults[0]}) but here: {path}" if faults else None
        return path, [moved] if moved else []
    path.parent.rmdir()
    raise OSError(
        first.errno,
        f"Result cannot be written: got {plain('; '.join(faults), 800)}, expected a writable disk with space. Nothing "
        f"is lost: free some space and start the training again, it will only write the result",
        str(file),
    ) from first


def _write_best_beside(
    trainer: Trainer, file: Path, texts: Mapping[str, str] | None, pictures: dict[str, Image.Image | None]
) -> list[str]:
    """Where an earlier state had the lowest validation loss: its weights beside the result. Returns what to tell."""
    if trainer.validation is None:
        return []
    (step, loss), best, settings = trainer.validation, trainer.best, trainer.settings
    told = [f"validation loss {loss:.4g} at step {step}, lowest {best.loss:.4g} at step {best.step}"]
    if trainer.has_ended_early:
        told.append(f"ended early: no lower validation loss after step {best.step}")
    state = read_best(trainer.folder) if settings.keep_best and best.step != trainer.step else None
    if state is None:
        return told
    place = file.with_stem(f"{file.stem}_best")
    try:
        save_result(place, trainer.objective, state["parameters"], settings, texts)
    except OSError as error:
        return [*told, f"the state of the lowest is not written ({plain(str(error.strerror or error), 200)})"]
    is_stopped = trainer.step < settings.steps and not trainer.has_ended_early
    if isinstance(trainer.sample, Validation) and not is_stopped and not trainer.processes.is_sharded:
        pictures["best.png"] = _compare_best(trainer, state)
    return [*told, f"the state of the lowest is kept: {place}"]


def _compare_best(trainer: Trainer, best: Mapping) -> Image.Image:
    """The validation pictures of the best state and of the last one, a row each."""
    with trainer.averaged(), torch.no_grad():
        trainer.objective.eval()
        last = trainer.sample.row()
        with trainer.holding(best["parameters"]):
            first = trainer.sample.row()
        trainer.objective.train()
    return join_column(
        [
            label_above(first, f"step {best['step']}, validation loss {best['loss']:.4g}"),
            label_above(last, f"step {trainer.validation[0]}, validation loss {trainer.validation[1]:.4g}"),
        ]
    )


def _write_beside(
    folder: Path, settings, step: int, file: Path, pictures: Mapping[str, Image.Image | None]
) -> list[str]:
    """The pictures and the note of a result; returns what to tell the user where there is no room for them."""
    stops = _number_in_result(folder, "stops") + (step < settings.steps)
    mark = json.dumps({"step": step, "file": str(file), "stops": stops})
    try:
        write_atomically(folder / RESULT, lambda temporary: temporary.write_text(mark, encoding="utf-8"))
        for name, picture in pictures.items():
            if picture is not None:
                write_atomically(folder / name, lambda temporary, picture=picture: picture.save(temporary, "PNG"))
    except OSError as error:
        logger.warning("Pictures of the training are not kept: %s", error)
        return [f"pictures of the training are not kept ({plain(str(error.strerror or error), 200)})"]
    return []


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


_FAR = 1.25  # PixArt's bins of one size lie within a tenth of it


def describe_sizes(features: FeatureSet, config: PixArtConfig) -> list[str]:
    """A line where pictures were encoded at another size than the model was trained at; it may be meant so."""
    own = config.base_px
    counts: Counter[int] = Counter()
    for (height, width), count in Bins.of(features.bins).counts().items():
        counts[round((height * width) ** 0.5 * LATENT_DOWNSCALE)] += count
    others = Counter({size: count for size, count in counts.items() if not own / _FAR < size < own * _FAR})
    if not others:
        return []
    common = others.most_common(1)[0][0]
    return [
        f"{others.total()} of {counts.total()} pictures are of another size than the model's: about {common} px, and "
        f"it was trained at {own}"
    ]


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


def lora_factors(objective: Objective, weights: Mapping[str, Tensor]) -> dict[Target, Factor]:
    """The adapters' changes by the rows that they change; q, k and v apart."""
    factors = {}
    for name, module in objective.model.named_modules():
        if isinstance(module, AdaptedLinear):
            own = [key for key, _ in module.named_parameters(recurse=False)]
            factors |= module.changes(name, {key: weights[f"model.{name}.{key}"] for key in own})
    return factors


def model_weights(objective: Objective, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole model in the original layout: trained weights, and what is never trained."""
    model = objective.model
    own = {name: tensor for name, tensor in weights.items() if name.startswith("model.")}
    state = {name.removeprefix("model."): tensor for name, tensor in own.items()}
    if model.has_null_caption:
        state["y_embedder.y_embedding"] = model.y_embedder.y_embedding.detach().to("cpu", torch.float32)
    return state


def control_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ControlNet under the original's names."""
    return {name.removeprefix("control."): tensor for name, tensor in weights.items()}


def save_result(
    path: Path,
    objective: Objective,
    weights: Mapping[str, Tensor],
    settings: TrainingSettings,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a `.safetensors` file of what was trained, whole or not at all; settings and texts in its header."""
    dtype = DTYPES[settings.save_dtype]
    texts = {**(texts or {}), SETTINGS_KEY: json.dumps(settings_to_dict(settings)), "pixart_objective": settings.kind}
    config = objective.model.config
    if settings.is_adapter:
        save_lora(path, lora_factors(objective, weights), metadata=texts, dtype=dtype)
    elif isinstance(objective, ControlPrediction):
        save_controlnet(path, control_weights(weights), config, dtype=dtype, metadata=texts)
    else:
        save_checkpoint(path, model_weights(objective, weights), config, dtype=dtype, metadata=texts)
