"""Pickled weights that are objects of a quantising library, which only running its code would open."""

from collections.abc import Mapping

from ...quoting import shorten
from ..opcodes import Foreign

_MOST_DEPTH = 8
_OPTIMIZERS = ("optimizer", "optim", "optimizers")


def refuse_subclasses(content: object, file: str) -> None:
    """Raises ValueError where a weight of a pickled file is an object and no tensor, as torchao and quanto save it."""
    name = _foreign_weight(content, _MOST_DEPTH)
    if name is not None:
        raise ValueError(
            f"Weights of another library's class: got {shorten(file)} with an object for {shorten(name)} (as torchao "
            f"and optimum-quanto pickle their tensors), expected plain tensors. Load it with that library, and save "
            f"weight.dequantize() of each layer, or its safetensors form."
        )


def _foreign_weight(content: object, depth: int) -> str | None:
    if not isinstance(content, Mapping) or not depth:
        return None
    for key, value in content.items():
        if not isinstance(key, str) or key in _OPTIMIZERS:
            continue
        if isinstance(value, Foreign) and key.endswith(".weight"):
            return key
        found = _foreign_weight(value, depth - 1)
        if found is not None:
            return found
    return None
