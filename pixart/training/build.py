"""From a PixArt and settings to the objective: what is frozen, what is added, what is trained."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from ..controlnet import PixArtControlNet
from ..quoting import shorten
from ..transformer import PixArt
from ..weights.saving import DTYPES
from .adapting.base import freeze
from .adapting.kinds import add_adapters
from .objectives import (
    AdapterDistillation,
    ControlPrediction,
    Distillation,
    DistributionMatching,
    FullDistillation,
    NoisePrediction,
    Objective,
    PreservingPrediction,
)
from .recomputing import recompute_block, recompute_cheap
from .settings import TrainingSettings


def make_objective(
    model: PixArt, settings: TrainingSettings, device: torch.device | str = "cpu", null_caption: Tensor | None = None
) -> Objective:
    """What the settings ask to minimise, on `device`. The model becomes a part of it and is changed.

    null_caption: (L, D) T5 states of the empty caption, for a model without a learned one.
    Raises ValueError for settings that do not fit the model.
    """
    dtype = DTYPES[settings.dtype]
    if settings.train_variance and not model.config.learn_sigma:
        raise ValueError(
            "No variance to train: got train_variance with a model that predicts the noise alone, expected a model "
            "with learned sigma. Turn train_variance off."
        )
    made = _MAKERS[settings.kind](model.to(device), settings, dtype, null_caption)
    recompute = _RECOMPUTING[settings.checkpointing]
    if recompute is not None:
        for block in _trained_blocks(made):
            recompute(block)
    return made


def _lora(model, settings, dtype, null_caption):
    adapters = add_adapters(freeze(model, dtype, settings.base_dtype), settings)
    if settings.prior_target == "model":
        return PreservingPrediction(model, settings, dtype, null_caption, adapters)
    return NoisePrediction(model, settings, dtype, null_caption)


def _full(model, settings, dtype, null_caption):
    _check_base_dtype(settings)
    model.float().requires_grad_(True)
    return NoisePrediction(model, settings, dtype, null_caption)


def _controlnet(model, settings, dtype, null_caption):
    copies = min(settings.control_blocks, model.config.depth - 1)
    device = next(model.parameters()).device
    control = PixArtControlNet.from_base(model, copies, dtype=torch.float32, device=device)
    freeze(model, dtype, settings.base_dtype)
    return ControlPrediction(model, settings, dtype, null_caption, control)


def _lcm_lora(model, settings, dtype, null_caption):
    adapters = add_adapters(freeze(model, dtype, settings.base_dtype), settings)
    return AdapterDistillation(model, settings, dtype, null_caption, adapters)


def _lcm(model, settings, dtype, null_caption):
    _check_base_dtype(settings)
    teacher = freeze(deepcopy(model), dtype)
    model.float().requires_grad_(True)
    target = deepcopy(model).requires_grad_(False)
    return FullDistillation(model, settings, dtype, null_caption, teacher, target)


def _dmd_lora(model, settings, dtype, null_caption):
    if settings.dmd_fake == "full":
        _check_base_dtype(settings)
        fake, fake_adapters = deepcopy(model).float().requires_grad_(True), {}
        adapters = add_adapters(freeze(model, dtype), settings)
    else:
        fake = _twin(freeze(model, dtype, settings.base_dtype))
        adapters, fake_adapters = add_adapters(model, settings), add_adapters(fake, settings)
    return DistributionMatching(model, settings, dtype, null_caption, fake, fake_adapters, adapters)


def _dmd(model, settings, dtype, null_caption):
    _check_base_dtype(settings)
    frozen = freeze(deepcopy(model), dtype)
    model.float().requires_grad_(True)
    if settings.dmd_fake == "full":
        fake = deepcopy(model)
        return DistributionMatching(model, settings, dtype, null_caption, fake, {}, {}, teacher=frozen)
    fake_adapters = add_adapters(frozen, settings)
    return DistributionMatching(model, settings, dtype, null_caption, frozen, fake_adapters, {})


def _twin(model: PixArt) -> PixArt:
    """A model of the same weights, not of copies: what is put on its layers is its own."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return deepcopy(model, shared)


_MAKERS = {
    "lora": _lora,
    "full": _full,
    "dreambooth": _full,
    "controlnet": _controlnet,
    "lcm": _lcm,
    "lcm_lora": _lcm_lora,
    "dmd": _dmd,
    "dmd_lora": _dmd_lora,
}


_RECOMPUTING = {"off": None, "selective": recompute_cheap, "on": recompute_block}


def _check_base_dtype(settings):
    if settings.base_dtype != "same":
        raise ValueError(
            f"Nothing is frozen in this training: got base dtype {shorten(settings.base_dtype)} with kind "
            f"{shorten(settings.kind)}, expected 'same'. Train a LoRA to keep the base in 8 bits."
        )


def _trained_blocks(objective: Objective) -> list[nn.Module]:
    """The blocks whose activations a backward pass needs."""
    blocks = list(objective.model.blocks)
    if isinstance(objective, ControlPrediction):
        blocks += list(objective.control.controlnet)
    if isinstance(objective, DistributionMatching):
        blocks += list(objective.fake.blocks)
    return blocks


def is_distillation(objective: Objective) -> bool:
    """Whether the result is sampled as a consistency model, in few steps without guidance."""
    return isinstance(objective, Distillation)
