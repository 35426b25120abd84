"""Trainings inside a graph: weights out of a MODEL, results into one, with the host's progress and interruption.

A prompt runs under `torch.inference_mode`, whose tensors take no part in a backward pass: a training leaves it, and
copies what comes in.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from PIL import Image

from ....pixart.checkpoint import NULL_CAPTION_KEY, expected_shapes
from ....pixart.config import LATENT_DOWNSCALE, PixArtConfig
from ....pixart.data.buckets import Bins
from ....pixart.data.examples import FeatureSet
from ....pixart.data.features import CachedFeatures
from ....pixart.data.sketches import differences, sketch_weights, write_sketch
from ....pixart.data.storage.index import MANIFEST
from ....pixart.lora import read_lora
from ....pixart.tracking.weights_and_biases import describe_mode, usual_mode
from ....pixart.training.processes import SingleProcess
from ....pixart.training.run import TrainingResult, check_name, choose_folder, count_stops, lora_factors, train
from ....pixart.training.settings import RunConfig, TrainingSettings, parse_settings, write_config
from ....pixart.training.validation import Decode, ValidationPrompt, write_prompts
from ....pixart.transformer import PixArt
from ....pixart.weights.controlnets import read_controlnet
from ....pixart.weights.reading import read_checkpoint
from ....pixart.weights.saving import DTYPES, save_checkpoint, write_weights
from ..controlnet import make_control
from ..folders import hide_paths, show_path
from ..loading import AUTO, hints_of, load_patcher
from ..lora import PREFIX, add_lora, find_lora, host_key, patched_weight
from ..pictures import to_image
from ..server.users import own_output
from ..text.captions import pixart_config
from .view import TrainingView

logger = logging.getLogger(__name__)

RUNS = "pixart_training"  # below the output folder
# Where results go, below the output folder: the host looks for models there.
PLACES = {"lora": "loras", "lcm_lora": "loras", "dmd_lora": "loras", "controlnet": "controlnet"}
WHOLE_MODELS = "diffusion_models"
AUTO_DTYPE = "auto"
_HALVES = (torch.float16, torch.bfloat16)
_VALIDATION_PROMPTS = 4


@dataclass(frozen=True)
class TrainingOutputs:
    """What a training node gives. trained: MODEL or CONTROL_NET. curve, samples: IMAGE. info: in lines of text."""

    trained: object
    file: str
    curve: torch.Tensor
    samples: torch.Tensor
    info: str


def make_settings(kind: str, more: str, dtype: str = AUTO_DTYPE, **values) -> TrainingSettings:
    """Settings out of a node's inputs. more: further ones, in lines of "name: value", which win.

    dtype: of saving.DTYPES, or "auto": bf16 on a GPU that has it, otherwise fp32. Raises ValueError for bad ones.
    """
    if dtype == AUTO_DTYPE:
        device = comfy.model_management.get_torch_device()
        dtype = "bf16" if device.type == "cuda" and comfy.model_management.should_use_bf16(device) else "fp32"
    return parse_settings(more, {"kind": kind, "dtype": dtype, **values})


def run_training(
    model,
    features: FeatureSet,
    settings: TrainingSettings,
    name: str,
    *,
    resume: bool = True,
    validation=None,
    vae=None,
    validation_features: FeatureSet | None = None,
    start_from: str | None = None,
    hidden=None,
) -> TrainingOutputs:
    """Train what the settings say on a MODEL, which stays as it is; LoRAs on it count as part of its weights.

    validation: CONDITIONING of prompts to sample, None takes captions of the dataset; vae: decodes the pictures, None
    for no pictures. validation_features: a set of its own for the validation loss. start_from: one of list_loras to
    begin with (see adapting.start). An interruption ends the training alone: everything is saved, and the graph goes on
    with what is there; a second one ends the prompt. Before the first step it ends the prompt at once.
    Raises ValueError for inputs that cannot be trained on, TrainingDiverged, and OSError for a full disk.
    """
    config = pixart_config(model)
    output = Path(folder_paths.get_output_directory())
    _NAMES[str(getattr(hidden, "unique_id", None))] = name
    runs = output / own_output(RUNS)
    runs.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts lie in it
    folder = choose_folder(runs, name, resume, settings.steps)
    place = PLACES.get(settings.kind, WHOLE_MODELS), own_output()
    start = None if start_from is None else read_lora(find_lora(start_from), config)
    device = model.load_device
    events = TrainingView(settings, hidden, device)
    with torch.inference_mode(False), torch.enable_grad():
        plain = plain_model(model, settings, device)
        prompts = _prompts(validation, features, settings, config)
        try:
            result = train(
                plain,
                features,
                settings,
                folder,
                resume=resume,
                processes=SingleProcess(device),
                events=events,
                prompts=prompts if vae is not None else (),
                decode=None if vae is None else _decoder(vae),
                show=events.show_pictures,
                file=output.joinpath(*place, f"{folder.name}.safetensors"),
                texts=getattr(model.model, "pixart_stages", None),
                start=start,
                held_out=validation_features,
            )
        finally:
            comfy.model_management.soft_empty_cache()
        if result.step == 0:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if events.is_interrupted:
                raise comfy.model_management.InterruptProcessingException
        _go_on_after_interruption()
        trained = _trained(model, result, settings)
    notes = [*_missing_pictures(settings, validation, vae), *map(hide_paths, result.notes)]
    return _outputs(trained, result, settings, notes)


_NAMES: dict[str, str] = {}  # of trainings, by the nodes that ran them


def fingerprint_training(name: str | None, hidden) -> tuple[str, int]:
    """Changes each time that a training of this name is stopped early, so that the host runs the node once more.

    Of several users each has trainings of his own.

    name: None where it is linked, and not known before the graph runs: then the node's last one.
    """
    name = _NAMES.get(str(getattr(hidden, "unique_id", None))) if name is None else name
    root = own_output(RUNS)
    return root, 0 if name is None else count_stops(Path(folder_paths.get_output_directory(), root), name)


def _missing_pictures(settings: TrainingSettings, validation, vae) -> list[str]:
    """Why there are no validation pictures, where somebody asked for some."""
    if settings.sample_every and vae is None:
        return ["no validation pictures: connect a vae"]
    if validation is not None and not settings.sample_every:
        return ["no validation pictures: set sample_every"]
    return []


def plain_model(model, settings: TrainingSettings, device: torch.device) -> PixArt:
    """The MODEL's weights, with its LoRAs and merges in them, as a PixArt of PyTorch's own operations on `device`.

    What is to be trained, or to be copied for it, comes in fp32, a base to be frozen in the dtype of the maths. The
    MODEL leaves the graphics memory first, and weights come one by one, so that none is there twice.
    """
    config = pixart_config(model)
    dtype = DTYPES[settings.dtype] if settings.is_adapter else torch.float32
    if not comfy.model_management.is_device_cpu(device):
        comfy.model_management.unload_all_models()
    names = set(expected_shapes(config))
    if not model.model.has_null_caption:
        names.discard(NULL_CAPTION_KEY)
    patches = model.get_key_patches(PREFIX)
    weights = {name: patched_weight(patches, host_key(name), device).to(dtype) for name in names}
    plain = PixArt(config, device="meta")
    plain.load_state_dict(weights, assign=True)
    if not model.model.has_null_caption:
        plain.to(device)
    return plain


def export_config(
    model,
    features,
    settings: TrainingSettings,
    name: str,
    *,
    validation=None,
    vae=None,
    resume: bool = True,
    validation_features=None,
    start_from: str | None = None,
) -> Path:
    """Write a configuration for `python -m pixart train`, and beside it what it needs; returns its path.

    A model with LoRAs or merges on it is written there whole, any other is named where it lies, with what was chosen
    of it. For validation pictures their prompts and the VAE are written too.
    Raises ValueError when the dataset is not on disk, and for validation prompts without a VAE.
    """
    check_name(name)
    root = Path(folder_paths.get_output_directory(), own_output(RUNS))
    places = {"features": features} | ({"validation_features": validation_features} if validation_features else {})
    places = {name: _manifest_of(each) for name, each in places.items()}
    if validation is not None and vae is None and settings.sample_every:
        raise ValueError(
            "No VAE for the validation pictures: got prompts alone, expected a VAE with them. Connect one, or set "
            "sample_every to 0."
        )
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    config = pixart_config(model)
    prompts = () if vae is None else _prompts(validation, features, settings, config)
    own = {"validation": f"{name}.prompts.safetensors", "vae": f"{name}.vae.safetensors"} if prompts else {}
    if prompts:
        write_prompts(root / own["validation"], prompts)
        write_weights(root / own["vae"], vae.get_sd(), {"format": "pt"})
    path = root / f"{name}.yaml"
    sketch = sketch_weights(config, _weights(model))
    write_sketch(root / f"{name}.base.safetensors", sketch)
    write_config(
        path,
        RunConfig(
            **_model_place(model, sketch, root / f"{name}.model.safetensors"),
            **places,
            settings=settings,
            output=str(root.resolve()),
            name=name,
            resume=resume,
            base=f"{name}.base.safetensors",
            data=features.identity,
            start_from=None if start_from is None else str(find_lora(start_from).resolve()),
            **own,
        ),
    )
    return path


def _manifest_of(features) -> str:
    if not isinstance(features, CachedFeatures):
        raise ValueError(
            f"Encoded pictures are not on disk: got {type(features).__name__}, expected the output of PixArt Encode "
            f"Dataset. Connect that node."
        )
    return str(Path(features.shards.folder).resolve() / MANIFEST)


def _weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that a MODEL runs with by their original names, one by one, on the CPU.

    They are in fp32, except those in half precision that nothing was added to.
    """
    names = set(expected_shapes(pixart_config(model)))
    if not model.model.has_null_caption:
        names.discard(NULL_CAPTION_KEY)
    patches = model.get_key_patches(PREFIX)
    for name in sorted(names):
        weight = patched_weight(patches, host_key(name), torch.device("cpu"))
        (stored, _), *changes = patches[host_key(name)]
        yield name, weight if changes or stored.dtype not in _HALVES else weight.to(stored.dtype)


def _model_place(model, sketch: Mapping, own: Path) -> dict:
    """Where a training finds the MODEL, as fields of RunConfig: its file, or one of its own where that differs."""
    source = getattr(model, "cached_patcher_init", None)
    if source is not None and source[0] is load_patcher and not model.patches:
        path, variant, _, weights = source[1]
        if _holds(path, variant, weights, sketch):
            return {"model": str(Path(path).resolve()), "variant": variant, "weights": weights}
    save_checkpoint(
        own, dict(_weights(model)), pixart_config(model), metadata=getattr(model.model, "pixart_stages", None)
    )
    return {"model": str(own.resolve())}


def _holds(path, variant: str, weights: str, sketch: Mapping) -> bool:
    """Whether a file, read with what was chosen of it, gives the model of a sketch."""
    try:
        stored = read_checkpoint(path, weights=weights, **hints_of(variant))
    except (OSError, ValueError):  # gone or changed since it was loaded
        return False
    tensors = ((name, tensor) for name, tensor in stored.state_dict.items() if name in sketch["weights"])
    return not differences(sketch, sketch_weights(stored.config, tensors))


def _trained(model, result: TrainingResult, settings: TrainingSettings):
    """The MODEL or CONTROL_NET that the graph goes on with."""
    if settings.is_adapter:
        return add_lora(model, lora_factors(result.objective, result.weights))
    if settings.kind == "controlnet":
        return make_control(read_controlnet(result.file))
    return load_patcher(result.file, AUTO)


def _outputs(trained, result: TrainingResult, settings: TrainingSettings, notes: Sequence[str]) -> TrainingOutputs:
    shown, is_done = show_path(result.file), result.is_done
    lines = [
        f"{'done' if is_done else 'stopped'}: {result.step} of {settings.steps} steps",
        *(() if is_done else ("queue it again to go on",)),
        f"saved in output: {shown.removeprefix('output/')}",
    ]
    if settings.wandb:
        lines.append(describe_mode(usual_mode(), "the training's folder"))
    lines += notes
    samples = result.strip or Image.new("RGB", (64, 64), (128, 128, 128))
    return TrainingOutputs(trained, shown, to_image(result.curve), to_image(samples), "\n".join(lines))


def _go_on_after_interruption() -> None:
    """The interruption was for the training: what comes after it in the graph is not meant."""
    if comfy.model_management.processing_interrupted():
        logger.info("PixArt training was interrupted: saved, and the graph goes on with what is there")
        comfy.model_management.interrupt_current_processing(False)


def _decoder(vae) -> Decode:
    def decode(latent):
        with torch.inference_mode():
            pictures = vae.decode(latent.cpu())
        return pictures.reshape(-1, *pictures.shape[-3:]).clone()

    return decode


def _prompts(validation, features: FeatureSet, settings, config: PixArtConfig) -> list[ValidationPrompt]:
    """What is to be sampled: each prompt of a CONDITIONING, or the dataset's first different captions."""
    if not settings.sample_every:
        return []
    if validation is not None and settings.kind != "controlnet":
        counts = Bins.of(features.bins).counts()
        common = max(counts, key=counts.get)
        return [prompt for states, extra in validation for prompt in _prompts_of(states, extra, common, config)]
    chosen: dict[str, ValidationPrompt] = {}
    for index in range(len(features)):
        example = features[index]
        size = tuple(example.latent.shape[-2:])
        key = example.text or str(index)
        chosen.setdefault(key, ValidationPrompt(example.caption.clone(), size, example.hint, example.text))
        if len(chosen) == _VALIDATION_PROMPTS:
            break
    return list(chosen.values())


def _prompts_of(states, extra: Mapping, common: Sequence[int], config: PixArtConfig) -> Iterator[ValidationPrompt]:
    if states.shape[-1] != config.caption_channels:
        raise ValueError(
            f"Caption width mismatch: got {states.shape[-1]}, expected {config.caption_channels} in the validation "
            f"prompts. Encode them with the T5 text encoder of this PixArt model."
        )
    size_px = extra.get("pixart_size")
    size = tuple(side // LATENT_DOWNSCALE for side in size_px) if size_px else tuple(common)
    mask = extra.get("attention_mask")
    for row, caption in enumerate(states):
        keep = slice(None) if mask is None else mask[row % len(mask)].bool().cpu()
        yield ValidationPrompt(caption.detach().cpu()[keep].clone(), size)


def register_folders() -> None:
    """Let ControlNets that were trained here be found by every loader, as the host does for its own kinds."""
    kind = PLACES["controlnet"]
    folder_paths.add_model_folder_path(kind, str(Path(folder_paths.get_output_directory(), kind)))
