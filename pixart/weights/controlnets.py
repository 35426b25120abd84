"""Reads and writes PixArt ControlNet files: with their base model or alone, in the original's or diffusers' layout."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..config import ALPHA, SIGMA, SIGMA_VAE_SCALE, PixArtConfig, read_name
from ..files.atomic import write_atomically
from ..quoting import shorten
from .checking import check_weights, expected_shapes
from .control_layouts import control_to_diffusers, control_to_original, identify_control, part_controlnet
from .detection import detect, guess_heads, mlp_ratio, saved_fields
from .folders import TRANSFORMER_STEMS, read_json
from .layouts import CONFIG_KEY
from .reading import Checkpoint, finish_checkpoint, naming, open_weights, quantisation_settings, read_weights
from .saving import names_file, write_weights
from .wrappers import to_original

ALPHA_CLASS, SIGMA_CLASS = "PixArtControlNetAdapterModel", "PixArtSigmaControlNetAdapterModel"
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class ControlNetCheckpoint:
    """A ControlNet read from disk, ready for `PixArtControlNet(config, num_copies).load_state_dict(state_dict)`.

    state_dict: original names, checked. base: the model in the same file, None when it holds control weights alone.
    config: the base's; without one, a configuration whose blocks are these, and whose other fields say nothing.
    family: "alpha" or "sigma", None when nothing shows it.
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    config: PixArtConfig
    num_copies: int
    family: str | None
    base: Checkpoint | None


def read_controlnet(
    path: str | os.PathLike, *, weights: str = "ema", packed: bool = False, **hints
) -> ControlNetCheckpoint:
    """Read a ControlNet from a file (.pth, .safetensors, .gguf, ...) or a diffusers folder.

    weights: "ema" or "model", see `wrappers.identify`. packed: GGUF's weights as `quantised.packed.Packed`, not as
    numbers. hints: for the base model, see `detection.detect`.
    Raises FileNotFoundError for a missing file and ValueError for everything else, naming the file.
    """
    path = Path(path)
    name = "/".join(path.absolute().parts[-4:])
    with naming(path):
        opened = open_weights(path)
        config_file = path / "config.json"
        model_config = read_json(config_file) if config_file.is_file() else {}
        identified = identify_control(opened.content, weights, opened.metadata)
        found = read_weights(opened, identified, quantisation_settings(model_config), packed=packed)
        saved = saved_fields(found)
        base_weights, state_dict = part_controlnet(found)
        base = None
        if base_weights:
            base = finish_checkpoint(path, base_weights, detect(base_weights, name=name, **hints))
        config = base.config if base else _config_of(state_dict, saved, model_config)
        num_copies = check_control_weights(state_dict, config)
    family = base.detection.family if base else _family_of(saved, model_config, name)
    state_dict = {f"controlnet.{name}": tensor for name, tensor in state_dict.items()}
    return ControlNetCheckpoint(path, state_dict, config, num_copies, family, base)


def save_controlnet(
    path: str | os.PathLike,
    state_dict: Mapping[str, torch.Tensor],
    config: PixArtConfig,
    layout: str = "original",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    base: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a ControlNet: `.safetensors`, `.pth` ({'state_dict': ...}), or a diffusers folder for any other path.

    config: the base model's. layout: "original" or "diffusers"; a folder is always diffusers.
    base: the base model's weights, to be in the same file as in the official ones; original layout only.
    dtype: None keeps each. metadata: texts that are kept with the weights; the configuration is added to them.
    A file appears complete or not at all; a folder with content is not replaced.
    Raises ValueError for weights that are no ControlNet of this base, and for a layout that cannot hold them.
    """
    path = Path(path)
    if layout not in ("original", "diffusers"):
        raise ValueError(
            f"Unknown layout: got {shorten(layout)}, expected 'original' or 'diffusers'. Choose one of them."
        )
    weights = control_to_original(state_dict)
    num_copies = check_control_weights(weights, config)
    is_diffusers = layout == "diffusers" or not names_file(path)
    if is_diffusers and base is not None:
        raise ValueError(
            "No room for the base model: got a diffusers layout, expected the original one. Save the ControlNet alone, "
            "or choose the original layout and a file."
        )
    if is_diffusers:
        weights = control_to_diffusers(weights)
    elif base is not None:
        original = to_original(base)
        check_weights(original, config)
        weights = {f"base_model.{name}": tensor for name, tensor in original.items()} | weights
    texts = {str(key): str(value) for key, value in (metadata or {}).items()}
    texts |= {"format": "pt", CONFIG_KEY: json.dumps(asdict(config))}
    if names_file(path):
        write_weights(path, weights, texts, dtype)
    else:
        _save_folder(path, weights, texts, dtype, _diffusers_config(config, num_copies))


def check_control_weights(state_dict: Mapping, config: PixArtConfig) -> int:
    """Check original-layout control weights against their base's configuration; returns the number of copied blocks.

    Raises ValueError naming the tensor that is missing, unknown, of another shape, or not of a floating type.
    """
    weights = {name.removeprefix("controlnet."): tensor for name, tensor in state_dict.items()}
    num_copies = 1 + max((int(name.partition(".")[0]) for name in weights), default=-1)
    if not 1 <= num_copies < config.depth:
        raise ValueError(
            f"Wrong number of copied blocks: got {num_copies} over a base of {config.depth} blocks, expected 1 to "
            f"{config.depth - 1}. Choose a complete ControlNet, and the model that it was trained on."
        )
    expected = expected_control_shapes(config, num_copies)
    for problem, names in (("missing", expected.keys() - weights), ("unknown", weights.keys() - expected)):
        if names:
            raise ValueError(
                f"Weights are {problem}: got {len(weights)} tensors, {problem} {shorten(min(names))} and "
                f"{len(names) - 1} more, expected exactly the {len(expected)} of {num_copies} copied blocks. Download "
                f"the complete ControlNet."
            )
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape or not weights[name].dtype.is_floating_point:
            raise ValueError(
                f"Wrong tensor {shorten(name)}: got {tuple(weights[name].shape)} of {weights[name].dtype}, expected "
                f"{shape} of a floating type. Choose a ControlNet of this PixArt model."
            )
    return num_copies


def expected_control_shapes(config: PixArtConfig, num_copies: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a control branch over a base of this configuration, named `{i}.copied_block...`."""
    width, shapes = config.hidden_size, {}
    for name, shape in expected_shapes(replace(config, depth=num_copies)).items():
        match = _BLOCK.fullmatch(name)
        if match:
            shapes[f"{match[1]}.copied_block.{match[2]}"] = shape
    for index in range(num_copies):
        for projection in ("before_proj", "after_proj") if index == 0 else ("after_proj",):
            shapes[f"{index}.{projection}.weight"] = (width, width)
            shapes[f"{index}.{projection}.bias"] = (width,)
    return shapes


def _config_of(control: Mapping[str, torch.Tensor], saved: dict, model_config: Mapping) -> PixArtConfig:
    """The base's configuration as far as control weights tell it; what they do not is saved, or a default.

    Heads are no shape: a wrong guess does no harm, since `PixArtControlNet.match_base` takes the base's.
    """
    width = _shape(control, "0.after_proj.weight", 2)[0]
    copies = 1 + max(int(name.partition(".")[0]) for name in control)
    heads = saved.get("num_heads") or model_config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1 or width % heads:
        heads = guess_heads(width)
    ratios = {
        int(name.partition(".")[0]): _shape(control, name, 4)[-1]
        for name in control
        if name.endswith(".attn.sr.weight")
    }
    found = {
        "hidden_size": width,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio(_shape(control, "0.copied_block.mlp.fc1.weight", 2)[0], width),
        "qk_norm": "0.copied_block.attn.q_norm.weight" in control,
        "kv_compress_ratio": max(ratios.values(), default=saved.get("kv_compress_ratio", 1)),
        "kv_compress_layers": tuple(sorted({*ratios, *saved.get("kv_compress_layers", ())})),
    }
    unknown = {"depth": max(PixArtConfig.depth, copies + 1), "micro_condition": False}
    return PixArtConfig(**{**unknown, **saved, **found})


def _shape(control: Mapping[str, torch.Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(control[name].shape) if name in control else None
    if shape is None or len(shape) != dimensions or 0 in shape:
        raise ValueError(
            f"Weights are missing or damaged: got {shape} for {shorten(name)}, expected {dimensions} dimensions. "
            f"Download the complete ControlNet."
        )
    return shape


def _family_of(saved: Mapping, model_config: Mapping, name: str) -> str | None:
    if "vae_scale" in saved:
        return SIGMA if abs(saved["vae_scale"] - SIGMA_VAE_SCALE) < 1e-4 else ALPHA
    if model_config.get("_class_name") == SIGMA_CLASS:
        return SIGMA
    return read_name(name)[0]


def _diffusers_config(config: PixArtConfig, num_copies: int) -> dict:
    return {
        "_class_name": SIGMA_CLASS if config.is_sigma else ALPHA_CLASS,
        "num_layers": num_copies,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "cross_attention_dim": config.hidden_size,
    }


def _save_folder(path: Path, weights: dict, texts: dict, dtype: torch.dtype | None, model_config: dict) -> None:
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(
            f"Folder is not empty: got {shorten(str(path), 300)}, expected a new one. Choose another name."
        )
    write_weights(path / f"{TRANSFORMER_STEMS[0]}.safetensors", weights, texts, dtype)
    text = json.dumps(model_config, indent=2) + "\n"
    write_atomically(path / "config.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
