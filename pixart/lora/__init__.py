"""LoRAs of every kind: merge them into weights; read, describe and save them. Dict in, dict out.

`kinds.py` holds the maths of each kind, `names.py` the names; `reading.py` and `saving.py` the files.
"""

from collections.abc import Mapping

import torch

from ..quoting import shorten
from .alphas import PEFT_CONFIG
from .kinds import Difference, Factor, Hadamard, Kronecker, LowRank
from .names import Target
from .reading import LoRA, load_lora, read_lora
from .saving import LAYOUTS, export_lora, export_notes, save_lora, split_factor

__all__ = [
    "LAYOUTS",
    "PEFT_CONFIG",
    "Difference",
    "Factor",
    "Hadamard",
    "Kronecker",
    "LoRA",
    "LowRank",
    "Target",
    "describe_lora",
    "export_lora",
    "export_notes",
    "load_lora",
    "merge",
    "read_lora",
    "save_lora",
    "split_factor",
]


def merge(state_dict: Mapping[str, torch.Tensor], lora: LoRA, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """The weights (original layout) with a LoRA in them: new tensors where it changes them, the same ones elsewhere.

    strength: 1 is the LoRA as trained, 0 changes nothing, and below 0 it is taken away.
    Sums are made in float32 at least; each weight keeps its dtype. Raises ValueError naming a missing weight.
    """
    merged = dict(state_dict)
    if not strength:
        return merged
    for target, factor in lora.factors.items():
        weight = merged.get(target.name)
        if weight is None or not factor.fits(target.shape(tuple(weight.shape))):
            got = "no such weight" if weight is None else f"a weight of shape {tuple(weight.shape)}"
            shape = f"a change of shape {factor.product_shape}" if factor.product_shape else f"this {factor.title}"
            raise ValueError(
                f"LoRA does not fit at {shorten(target.name)}: got {got}, expected one for {shape}. Choose a LoRA that "
                f"was trained on this PixArt model."
            )
        if factor.needs is not None:
            other = state_dict[factor.needs.name]
            factor = factor.bound(other[factor.needs.rows(other.shape[0])])
        exact = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        changed = exact.clone()
        rows = target.rows(weight.shape[0])
        changed[rows] = factor.apply(exact[rows], strength)
        merged[target.name] = changed.to(weight.dtype)
    return merged


def describe_lora(lora: LoRA) -> str:
    """What a LoRA is, in lines of text: kind, rank, alpha, keys, and every key that found no place."""
    factors = list(lora.factors.values())
    ranks = sorted({factor.rank for factor in factors if factor.rank})
    alphas = sorted({factor.alpha for factor in factors if factor.alpha is not None and factor.rank})
    total = lora.matched + len(lora.unmatched) + len(lora.text_encoder)
    sources = "; ".join(source for source in lora.alpha_sources if source != "none")
    lines = [
        f"kind: {', '.join(sorted({factor.title for factor in factors}))}",
        f"names: {', '.join(lora.layouts)}",
        f"rank: {_span(ranks)}",
        f"alpha: {_span(alphas)}" + (f" ({sources})" if sources else ""),
        f"keys: {lora.matched} of {total} matched, on {len({target.name for target in lora.factors})} weights",
    ]
    lines += [f"loaded in part: {lora.shortfall}"] if lora.shortfall else []
    lines += [f"assumed: {each}" for each in lora.assumed]
    lines += [f"text encoder, not loaded here: {key}" for key in lora.text_encoder]
    lines += [f"not matched: {key}" for key in lora.unmatched]
    return "\n".join(lines)


def _span(values: list) -> str:
    if not values:
        return "none"
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
