"""All settings of a training: one frozen dataclass, checked before any work, read from and written to YAML or JSON."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..config import CONFIGS
from ..data.streams.places import is_address
from ..diffusion import TRAIN_STEPS
from ..files.atomic import write_atomically
from ..files.documents import load_json, parse_yaml
from ..files.patterns import compile_pattern
from ..quoting import list_names, plain, shorten
from ..weights import saving

AUTO, WEIGHTS = "auto", ("ema", "model")  # of a checkpoint: its variant, and which of its weights
KINDS = ("lora", "full", "dreambooth", "controlnet", "lcm", "lcm_lora", "dmd", "dmd_lora")
ADAPTED = ("lora", "lcm_lora", "dmd_lora")
DISTILLED = ("lcm", "lcm_lora")
MATCHED = ("dmd", "dmd_lora")
NEEDS_NULL = (*DISTILLED, *MATCHED)  # their teachers are guided
FAKES = ("lora", "full")
ADAPTERS = ("lora", "loha", "lokr", "oft")
LOSSES = ("mse", "huber")
PRIOR_TARGETS = ("picture", "model")
WEIGHTINGS = ("none", "min_snr", "velocity")
TIMESTEPS = ("uniform", "log_normal")
OPTIMIZERS = ("adamw", "adamw8bit", "came", "prodigy", "lion", "adafactor", "schedulefree")
PIECEWISE = ("adamw", "adamw8bit", "came", "lion", "adafactor")  # each weight is treated for itself
SCHEDULES = ("constant", "cosine", "linear")
DTYPES = tuple(saving.DTYPES)
BASE_DTYPES = ("same", "fp8", "int8", "nf4")
CHECKPOINTING = ("off", "selective", "on")
# Which linear layers an adapter sits on, as patterns of their names in the original layout.
TARGETS = {
    "attention": r"blocks\.\d+\.(attn|cross_attn)\.\w+",
    "blocks": r"blocks\.\d+\.(attn|cross_attn|mlp)\.\w+",
    "all-linear": r".*",
    "custom": None,
}


@dataclass(frozen=True)
class TrainingSettings:
    """What is trained, on what part of the model, how, and what is reported.

    kind: of KINDS; DreamBooth is "dreambooth": full fine-tuning, or LoRA with any prior pictures in the data.
    steps: optimiser steps. batch_size: pictures per process and forward pass. accumulation: forward passes per step.
    learning_rate: Prodigy's is a factor, usually 1. lora_plus: factor of the learning rate of a LoRA's second matrix.
    clip_norm: largest norm of the gradients, 0 is off.
    schedule: of SCHEDULES, after `warmup_steps` of linear warm-up; floor: its last factor.
    dtype: of the maths; what is trained is always kept in fp32. base_dtype: "fp8" or "int8" keeps frozen
    layers in 8 bits, "nf4" in 4.
    save_dtype: of the file that is written at the end.
    checkpointing: of CHECKPOINTING: whether the backward pass computes each block again, or what is cheap in it, for
    less memory; True and False are "on" and "off". gradient_release: make the
    optimiser's steps in the backward pass. offload_optimizer: keep its states on the CPU. ema_decay: 0 is off.
    targets: of TARGETS; target_pattern: regular expression over layer names for "custom". alpha 0 means rank.
    adapter: of ADAPTERS, in place of a LoRA's; rank is the largest side of OFT's blocks. lokr_factor: the largest side
    of LoKr's small matrix.
    loss: of LOSSES; huber_c: where it turns linear. train_variance: also the bound of the learned variance.
    control_blocks: of a ControlNet, at most one fewer than the model has.
    weighting: of WEIGHTINGS, of a timestep's loss; timestep_weights: [timestep, factor] points, linear in between.
    timesteps: of TIMESTEPS, within [timestep_min, timestep_max]; log_normal: a logistic of N(mean, std) as the share.
    caption_dropout: share of captions replaced by the null caption. prior_weight: of pictures marked as prior.
    prior_target: of PRIOR_TARGETS, what is learned from those: the pictures, or what the frozen model makes of them.
    mask_floor: what places outside a picture's mask count for, where a dataset has masks (see data.variety.masks).
    lcm_*: guidance w of the teacher (x + w (x - null)), its DDIM steps, and the decay of the target's average.
    dmd_*: guidance of the teacher, the weight of its pictures of known noises (see data.pairs; 0 leaves them out), and
    what is trained of the network that follows the generator, of FAKES.
    checkpoint_every, sample_every, log_every: in steps, 0 is never. keep_last: checkpoints that stay.
    sample_steps, sample_guidance: of the validation pictures; sample_seed: of their noise.
    validation_share: of the pictures that are held out of the training, for the validation loss. validation_every:
    steps between its measurements, where pictures are held out or there is a set of its own. patience: ends the
    training after so many in a row without a new lowest one, 0 is never. keep_best: keep the state of the lowest one.
    tensorboard: log there too where it is installed. wandb: log to Weights & Biases as well, offline
    unless the owner of the machine allows more (see tracking.weights_and_biases).
    Raises ValueError naming the first setting that cannot work.
    """

    kind: str = "lora"
    steps: int = 1000
    batch_size: int = 1
    accumulation: int = 1
    seed: int = 0
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    schedule: str = "constant"
    warmup_steps: int = 0
    floor: float = 0.0
    clip_norm: float = 1.0
    lora_plus: float = 1.0
    dtype: str = "fp32"
    base_dtype: str = "same"
    checkpointing: str = "off"
    gradient_release: bool = False
    offload_optimizer: bool = False
    ema_decay: float = 0.0
    targets: str = "attention"
    target_pattern: str = ""
    adapter: str = "lora"
    lokr_factor: int = 0
    rank: int = 16
    alpha: float = 0.0
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    loss: str = "mse"
    huber_c: float = 0.1
    train_variance: bool = False
    weighting: str = "none"
    min_snr_gamma: float = 5.0
    timestep_weights: tuple[tuple[float, float], ...] = ()
    timesteps: str = "uniform"
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    timestep_min: int = 0
    timestep_max: int = TRAIN_STEPS - 1
    caption_dropout: float = 0.1
    noise_offset: float = 0.0
    prior_weight: float = 1.0
    prior_target: str = "picture"
    mask_floor: float = 0.1
    control_blocks: int = 13
    save_dtype: str = "fp32"
    lcm_guidance: float = 4.5
    lcm_steps: int = 50
    lcm_decay: float = 0.95
    dmd_guidance: float = 4.5
    dmd_regression: float = 0.25
    dmd_fake: str = "lora"
    checkpoint_every: int = 250
    keep_last: int = 2
    log_every: int = 1
    sample_every: int = 0
    sample_steps: int = 20
    sample_guidance: float = 4.5
    sample_seed: int = 0
    validation_share: float = 0.0
    validation_every: int = 100
    patience: int = 0
    keep_best: bool = True
    tensorboard: bool = True
    wandb: bool = False

    def __post_init__(self):
        object.__setattr__(self, "timestep_weights", _points(self.timestep_weights))
        if isinstance(self.checkpointing, bool):  # also what YAML makes of on and off
            object.__setattr__(self, "checkpointing", "on" if self.checkpointing else "off")
        for field in fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name), field.default))
        _check_choices(self)
        _check_ranges(self)
        _check_together(self)

    @property
    def is_adapter(self) -> bool:
        """Whether a LoRA is trained rather than weights of a model."""
        return self.kind in ADAPTED

    @property
    def adapter_alpha(self) -> float:
        """The LoRA's alpha: its rank unless another is set."""
        return self.alpha or float(self.rank)

    @property
    def pattern(self) -> str:
        """The regular expression of the layers that get an adapter."""
        return TARGETS[self.targets] or self.target_pattern


# Name -> (lowest, highest, what the number is).
_RANGES = {
    "steps": (1, 10_000_000, "a number of optimiser steps"),
    "batch_size": (1, 4096, "a number of pictures"),
    "accumulation": (1, 4096, "a number of forward passes per step"),
    "seed": (0, 2**64 - 1, "a whole number"),
    "weight_decay": (0, 10, "a small factor"),
    "warmup_steps": (0, 10_000_000, "a number of steps"),
    "floor": (0, 1, "a factor"),
    "clip_norm": (0, 1e6, "a norm, 0 for off"),
    "ema_decay": (0, 0.999999, "a decay, 0 for off"),
    "rank": (1, 1024, "a LoRA rank"),
    "lokr_factor": (0, 1024, "a largest side of the small matrix, 0 for about the root of the layer's"),
    "lora_plus": (0.01, 1000, "a factor, usually from 1 to 16"),
    "alpha": (0, 65536, "a LoRA alpha, 0 for the rank"),
    "dropout": (0, 0.95, "a share"),
    "huber_c": (1e-6, 1e3, "a width"),
    "min_snr_gamma": (1e-3, 1e6, "a signal-to-noise ratio"),
    "timestep_mean": (-10, 10, "a mean of the logit of time"),
    "timestep_std": (1e-3, 10, "a deviation of the logit of time"),
    "timestep_min": (0, TRAIN_STEPS - 1, "a timestep"),
    "timestep_max": (0, TRAIN_STEPS - 1, "a timestep"),
    "caption_dropout": (0, 1, "a share"),
    "noise_offset": (0, 1, "a share of the noise"),
    "prior_weight": (0, 1000, "a factor"),
    "mask_floor": (0, 1, "a factor"),
    "control_blocks": (1, 1000, "a number of blocks"),
    "lcm_guidance": (0, 100, "a guidance scale"),
    "lcm_steps": (1, TRAIN_STEPS, "a number of DDIM steps"),
    "lcm_decay": (0, 0.999999, "a decay"),
    "dmd_guidance": (0, 100, "a guidance scale"),
    "dmd_regression": (0, 1000, "a factor"),
    "checkpoint_every": (0, 10_000_000, "a number of steps, 0 for never"),
    "keep_last": (1, 1000, "a number of checkpoints"),
    "log_every": (1, 1_000_000, "a number of steps"),
    "sample_every": (0, 10_000_000, "a number of steps, 0 for never"),
    "sample_steps": (1, 1000, "a number of steps"),
    "sample_guidance": (0, 100, "a guidance scale"),
    "sample_seed": (0, 2**64 - 1, "a whole number"),
    "validation_share": (0, 0.5, "a share"),
    "validation_every": (1, 10_000_000, "a number of steps"),
    "patience": (0, 1_000_000, "a number of validations, 0 for never"),
}
_CHOICES = {
    "kind": KINDS,
    "optimizer": OPTIMIZERS,
    "adapter": ADAPTERS,
    "schedule": SCHEDULES,
    "dtype": DTYPES,
    "base_dtype": BASE_DTYPES,
    "save_dtype": DTYPES,
    "checkpointing": CHECKPOINTING,
    "targets": tuple(TARGETS),
    "loss": LOSSES,
    "prior_target": PRIOR_TARGETS,
    "weighting": WEIGHTINGS,
    "timesteps": TIMESTEPS,
    "dmd_fake": FAKES,
}
_HIGHEST_LEARNING_RATE = {"prodigy": 10.0, "lion": 0.01, "adafactor": 1.0}


def _points(given) -> tuple[tuple[float, ...], ...]:
    try:
        return tuple(tuple(map(float, point)) for point in given)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"Timestep weights cannot be read: got {shorten(given)}, expected points such as [[0, 1.0], [999, 0.5]]. "
            f"Correct them."
        ) from error


def _typed(name, value, default):
    """The value as the default's type: YAML reads 1e-4 as a text, and 1 where a float is meant."""
    kind = type(default)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    try:
        number = float(value) if kind in (int, float) and not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or (kind is int and not number.is_integer()):
        raise ValueError(
            f"Setting of the wrong kind: got {name} = {shorten(value)}, expected {kind.__name__} such as {default!r}. "
            f"Correct it in the node or in the configuration file."
        )
    return kind(number)


def _check_choices(settings):
    for name, choices in _CHOICES.items():
        if getattr(settings, name) not in choices:
            raise ValueError(
                f"Unknown {name.replace('_', ' ')}: got {shorten(getattr(settings, name))}, expected one of "
                f"{', '.join(choices)}. Choose one of them."
            )


def _number(value: float) -> str:
    return shorten(value) if isinstance(value, int) and abs(value) >= 2**63 else f"{value:g}"


def _check_ranges(settings):
    for name, (low, high, what) in _RANGES.items():
        value = getattr(settings, name)
        if not low <= value <= high:  # also refuses NaN
            raise ValueError(
                f"{name.replace('_', ' ').capitalize()} is out of range: got {_number(value)}, expected {what} "
                f"from {low:g} to {high:g}. Change it."
            )
    rate, highest = settings.learning_rate, _HIGHEST_LEARNING_RATE.get(settings.optimizer, 0.1)
    if not 0 < rate <= highest:
        usual = "1" if settings.optimizer == "prodigy" else "1e-4 for a LoRA, 1e-5 for a whole model"
        raise ValueError(
            f"Learning rate is out of range: got {rate:g}, expected more than 0 and at most {highest:g} with "
            f"{settings.optimizer}. Usual is {usual}."
        )


def _check_together(settings):
    if settings.timestep_min > settings.timestep_max:
        raise ValueError(
            f"Timestep range is empty: got {settings.timestep_min} to {settings.timestep_max}, expected a first that "
            f"is at most the last. Swap them."
        )
    if settings.targets == "custom" and settings.is_adapter:
        try:
            compile_pattern(settings.target_pattern)
        except ValueError as error:
            raise ValueError(
                f"Target pattern is no usable regular expression: got {shorten(settings.target_pattern)} "
                f"({shorten(error, 120)}), expected one such as 'blocks\\.\\d+\\.attn\\.qkv'. Correct it."
            ) from error
        if not settings.target_pattern:
            raise ValueError(
                "Target pattern is missing: got none with targets 'custom', expected a regular expression over layer "
                "names such as 'blocks\\.\\d+\\.attn\\.qkv'. Enter one, or choose another preset."
            )
    if settings.adapter != "lora":
        _check_other_adapter(settings)
    _check_piecewise(settings)
    if settings.optimizer == "schedulefree" and (settings.schedule != "constant" or settings.ema_decay):
        raise ValueError(
            f"Schedule-free optimiser with a schedule: got schedule {shorten(settings.schedule)} and ema_decay "
            f"{settings.ema_decay:g}, expected 'constant' and 0, since it averages the weights itself. Set them so; a "
            f"warm-up may stay."
        )
    if settings.lora_plus != 1 and (not settings.is_adapter or settings.optimizer == "prodigy"):
        raise ValueError(
            f"LoRA+ cannot be had here: got lora_plus {settings.lora_plus:g} with kind {shorten(settings.kind)} and "
            f"optimizer {shorten(settings.optimizer)}, expected a LoRA and another optimiser than prodigy, which finds "
            f"one rate for all. Set lora_plus to 1."
        )
    if settings.prior_target == "model" and settings.kind != "lora":
        raise ValueError(
            f"No frozen model to learn prior pictures from: got prior target 'model' with kind "
            f"{shorten(settings.kind)}, expected kind 'lora'. Train a LoRA, or set the prior target to 'picture'."
        )
    for point in settings.timestep_weights:
        if len(point) != 2 or not (0 <= point[0] < TRAIN_STEPS and 0 <= point[1] < math.inf):
            raise ValueError(
                f"Timestep weight is out of range: got {shorten(list(point))}, expected [timestep, factor] with a "
                f"timestep from 0 to {TRAIN_STEPS - 1} and a factor of at least 0. Correct it."
            )
    if settings.kind in DISTILLED and TRAIN_STEPS % settings.lcm_steps:
        raise ValueError(
            f"LCM steps do not divide the schedule: got {settings.lcm_steps}, expected a divisor of {TRAIN_STEPS} "
            f"such as 50. Set it to 50."
        )


def _check_piecewise(settings):
    names = [name for name in ("gradient_release", "offload_optimizer") if getattr(settings, name)]
    wrong = []
    if names and settings.optimizer not in PIECEWISE:
        wrong.append(f"optimizer {settings.optimizer}")
    if names and settings.dtype == "fp16":
        wrong.append("dtype fp16")
    if settings.gradient_release:
        wrong += [f"accumulation {settings.accumulation}"] if settings.accumulation > 1 else []
        wrong += [f"clip_norm {settings.clip_norm:g}"] if settings.clip_norm else []
    if wrong:
        raise ValueError(
            f"Steps of one weight at a time exclude other settings: got {list_names(names)} with "
            f"{list_names(wrong)}, expected one of {', '.join(PIECEWISE)}, bf16 or fp32, and with gradient_release "
            f"accumulation 1 and clip_norm 0, since no two gradients are there together. Change them."
        )


def _check_other_adapter(settings):
    usual = {"dora": False, "rslora": False, "lora_plus": 1.0}
    if settings.adapter == "oft":  # a rotation has no scale, and its input no part of its own
        usual |= {"alpha": 0.0, "dropout": 0.0}
    wrong = [f"{name} {getattr(settings, name)}" for name, value in usual.items() if getattr(settings, name) != value]
    wrong += [] if settings.is_adapter else [f"kind {settings.kind}"]
    if wrong:
        raise ValueError(
            f"Adapter of another kind: got {shorten(settings.adapter)} with {list_names(wrong)}, expected a kind that "
            f"trains a LoRA, without what LoRA alone has. Choose adapter 'lora', or leave these as they are by default."
        )


def settings_from_dict(values: Mapping) -> TrainingSettings:
    """The settings that a configuration names, defaults for the others. Raises ValueError for unknown names."""
    known = {field.name for field in fields(TrainingSettings)}
    unknown = sorted(set(values) - known, key=str)
    if unknown:
        raise ValueError(
            f"Unknown settings: got {list_names(unknown)}, expected some of {', '.join(sorted(known))}. "
            f"Correct or remove them."
        )
    return TrainingSettings(**values)


def parse_settings(text: str, values: Mapping) -> TrainingSettings:
    """Settings from `values`, and from lines of "name: value", which win. Raises ValueError for bad ones."""
    try:
        given = parse_yaml(text)
    except ValueError as error:
        raise ValueError(
            f"Further settings cannot be read: got {shorten(text)} ({shorten(error, 200)}), expected lines of 'name: "
            f"value'. Correct them."
        ) from error
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise ValueError(
            f"Further settings cannot be read: got {shorten(text)}, expected lines of 'name: value' such as "
            f"'huber_c: 0.1'. Correct them."
        )
    return settings_from_dict({**values, **given})


def settings_to_dict(settings: TrainingSettings) -> dict:
    """All settings as plain numbers, texts and lists."""
    return {**asdict(settings), "timestep_weights": [list(point) for point in settings.timestep_weights]}


@dataclass(frozen=True)
class RunConfig:
    """One training outside a graph: what to train on, where to, and how.

    model: checkpoint file or folder. variant: of config.CONFIGS where the file does not tell it, or "auto". weights:
    "ema" or "model", of a file with both. base: file with a sketch of the model that the configuration was made from
    (see data.sketches), which the model is to equal, or None.
    init: in place of a model, a DiT's file or folder to start from (see stages.dit). grow: the stage to bring the model
    to before its first step (see stages.growth), or "".
    validation_features: folder of encoded pictures for the validation loss, or None.
    start_from: a LoRA's file or PEFT folder whose weights a LoRA begins with (see adapting.start), or None.
    features: folder of encoded pictures, or several as {folder: share of an epoch}. data: their identity, which they
    are to have, or None.
    output: folder that gets the run.
    name: of the run, a plain file name. resume: go on from its last checkpoint.
    validation: safetensors file of encoded prompts to sample, or None; vae: file or folder to decode them with.
    prompts: texts to sample in place of those, or a .txt file with one a line; text_encoder, tokenizer: T5 for them.
    Relative paths are relative to the file, and ~ is the user's own folder.
    """

    model: str
    features: str | Mapping[str, float]
    settings: TrainingSettings
    output: str = "."
    name: str = "pixart_training"
    resume: bool = True
    validation: str | None = None
    vae: str | None = None
    variant: str = AUTO
    weights: str = WEIGHTS[0]
    base: str | None = None
    data: str | None = None
    prompts: tuple[str, ...] | str = ()
    text_encoder: str | None = None
    tokenizer: str | None = None
    init: str | None = None
    grow: str = ""
    start_from: str | None = None
    validation_features: str | None = None


def read_config(path: str | os.PathLike, init: str | None = None) -> RunConfig:
    """Read a YAML or JSON configuration. Raises FileNotFoundError, and ValueError naming what is wrong in it.

    init: in place of its model, see RunConfig.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Configuration not found: got {shorten(str(path), 300)}, expected a YAML or JSON file. Write one with the "
            f"node Export PixArt Training Config."
        )
    values = _parse(path)
    if init is not None:
        values = {**{key: value for key, value in values.items() if key != "model"}, "init": os.path.abspath(init)}
    known = {field.name for field in fields(RunConfig)}
    unknown, missing = sorted(set(values) - known, key=str), sorted({"features"} - set(values))
    begins = [key for key in ("model", "init") if values.get(key)]
    if not begins:
        missing.append("model")
    if len(begins) == 2:
        raise ValueError(
            f"Two beginnings: got model and init in {shorten(path.name)}, expected a model to go on with, or a DiT to "
            f"start from. Remove one of them."
        )
    if unknown or missing:
        raise ValueError(
            f"Configuration does not fit: got {shorten(path.name)} with unknown {shorten(unknown, 200)} and without "
            f"{missing}, expected the keys {', '.join(sorted(known))}. Correct it."
        )
    given = values.pop("settings", None) or {}
    wrong = [f"{key}: {shorten(value)}" for key, value in values.items() if not _fits(key, value)]
    if wrong or not isinstance(given, dict):
        raise ValueError(
            f"Configuration does not fit: got {plain(', '.join(wrong), 300) or 'other settings'} in "
            f"{shorten(path.name)}, expected texts (numbers in quotes), yes or no for resume, names with values below "
            f"settings. Correct it."
        )
    settings = settings_from_dict(given)
    if isinstance(values.get("prompts"), list):
        values["prompts"] = tuple(values["prompts"])
    places = {key: _place(path.parent, values[key]) for key in _PLACES if values.get(key)}
    if isinstance(values.get("prompts"), str):
        places["prompts"] = _place(path.parent, values["prompts"])
    if isinstance(values.get("grow"), int):
        values["grow"] = str(values["grow"])
    return RunConfig(settings=settings, **{"model": "", **values, **places})


def _is_several(value) -> bool:
    return isinstance(value, dict) and bool(value)


def _place(folder: Path, written: str | dict) -> str | dict:
    if _is_several(written):
        return {_place(folder, each): share for each, share in written.items()}
    if is_address(written):
        return written
    return str(folder / os.path.expanduser(written))


def _fits(key: str, value) -> bool:
    if key == "resume":
        return isinstance(value, bool)
    if key == "grow" and type(value) is int:
        return True
    if key == "prompts" and isinstance(value, list):
        return all(isinstance(each, str) for each in value)
    if key == "features" and _is_several(value):
        return all(isinstance(each, str) and type(of) in (int, float) for each, of in value.items())
    chosen = {"weights": WEIGHTS, "variant": (AUTO, *CONFIGS)}.get(key)
    return isinstance(value, str) and (chosen is None or value in chosen) or (value is None and key in _OPTIONAL)


_OPTIONAL = (
    *("validation", "vae", "base", "data", "text_encoder", "tokenizer", "init"),
    *("start_from", "validation_features"),
)
_PLACES = ("model", "features", "output", *(name for name in _OPTIONAL if name != "data"))


def write_config(path: str | os.PathLike, config: RunConfig) -> None:
    """Write a configuration that read_config reads: JSON for a `.json` name, YAML otherwise."""
    values = {field.name: getattr(config, field.name) for field in fields(RunConfig) if field.name != "settings"}
    values["settings"] = settings_to_dict(config.settings)
    values["prompts"] = config.prompts if isinstance(config.prompts, str) else list(config.prompts)
    path = Path(path)
    if path.suffix == ".json":
        text = json.dumps(values, indent=2) + "\n"
    else:
        import yaml

        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _parse(path: Path) -> dict:
    try:
        values = load_json(path) if path.suffix == ".json" else parse_yaml(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(
            f"Configuration cannot be read: got {shorten(path.name)} ({shorten(error, 300)}), expected YAML or JSON of "
            f"'key: value' lines. Correct it, or export it again."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(
            f"Configuration is no mapping: got {shorten(path.name)} with {type(values).__name__}, expected "
            f"'key: value' lines. Correct it, or export it again."
        )
    return values
