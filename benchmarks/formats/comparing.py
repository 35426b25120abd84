"""Two sets of weights of one model, as numbers."""

from collections.abc import Mapping

import torch

from . import Found


def plain_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights as its package computes with them, float32."""
    state = {}
    for name, weight in model.named_parameters():
        is_own = type(weight) not in (torch.nn.Parameter, torch.Tensor)
        plain = weight.dequantize() if is_own and hasattr(weight, "dequantize") else weight
        state[name] = plain.detach().float()
    return state


def compare(found: Mapping, peer: Mapping, original: Mapping) -> Found:
    """By the names of `found`. Raises KeyError where the others lack one."""
    error = max(
        float((tensor.float() - peer[name]).abs().max() / peer[name].abs().max().clamp(min=1e-9))
        for name, tensor in found.items()
    )
    cosine = min(
        float(torch.nn.functional.cosine_similarity(tensor.float().flatten(), original[name].float().flatten(), dim=0))
        for name, tensor in found.items()
        if original[name].any()
    )
    return Found(error, cosine)
