"""One quantised layer of a file while its stored parts are taken from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ...files.documents import parse_json
from ...quoting import list_names, shorten

_MOST_BYTES = 2**16  # of a layer's description


@dataclass
class Layer:
    """The parts of a layer. stem: its name. kind: what the form's sign says of it. settings: the quantization_config
    of config.json. shape_of: number of weights -> their shape, for forms that do not keep it. keep_packed: whether the
    weight may stay in blocks. taken: the names used.
    """

    tensors: Mapping[str, torch.Tensor]
    stem: str
    form: str
    file: str
    kind: str = ""
    settings: Mapping = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    shape_finder: Callable[[str, int], tuple[int, ...] | None] | None = None
    keep_packed: bool = False
    taken: set[str] = field(default_factory=set)

    def take(self, part: str) -> torch.Tensor:
        """A part that has to be there. Raises ValueError naming it."""
        tensor = self.take_any(part)
        if tensor is None:
            raise misfit(self, f"no {part}", f"it beside {list_names(sorted(self.taken)) or 'the others'}")
        return tensor

    def take_any(self, part: str) -> torch.Tensor | None:
        name = f"{self.stem}.{part}"
        if name in self.tensors:
            self.taken.add(name)
        return self.tensors.get(name)

    def shape_of(self, count: int) -> tuple[int, ...]:
        """The weight's shape, by its bias or by what the reader of the file knows of the model."""
        shape = self.shape_finder(self.stem, count) if self.shape_finder else None
        bias = self.tensors.get(f"{self.stem}.bias")
        if shape is None and bias is not None and bias.numel() and count % bias.numel() == 0:
            shape = (bias.numel(), count // bias.numel())
        if shape is None:
            raise misfit(self, f"{count} weights in groups", "a layer of known shape")
        return shape


def read_description(stored: torch.Tensor | str) -> dict | None:
    """The JSON object in a tensor of bytes or a text beside the weights; None where there is none."""
    is_tensor = isinstance(stored, torch.Tensor)
    if is_tensor and (stored.dtype != torch.uint8 or stored.numel() > _MOST_BYTES):
        return None
    try:
        content = parse_json(bytes(stored.flatten().tolist()) if is_tensor else stored)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def misfit(layer: Layer, got: str, expected: str) -> ValueError:
    """The error for parts that do not belong together, with file, format and layer."""
    return ValueError(
        f"Quantised weights cannot be read: got {got} for {shorten(layer.stem)} in {shorten(layer.file)} "
        f"({layer.form}), expected {expected}. Choose the same model in fp16 or bf16, or "
        f"save it again with that program."
    )
