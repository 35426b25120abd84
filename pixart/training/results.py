"""What a training leaves behind: a LoRA, a model or a ControlNet, as tensors and as a file."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..adapters import LowRank
from ..control_storage import save_controlnet
from ..lora import Target, save_lora
from ..saving import save_checkpoint
from .adapters import AdaptedLinear
from .build import DTYPES
from .objectives import ControlPrediction, Objective
from .settings import TrainingSettings, settings_to_dict

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
