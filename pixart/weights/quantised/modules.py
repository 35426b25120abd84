"""Layers over packed weights, for networks outside a host."""

import torch

from .packed import Packed


class PackedLinear(torch.nn.Module):
    """A linear layer without bias whose weight becomes numbers at each use."""

    def __init__(self, weight: Packed):
        super().__init__()
        self.packing = weight.packing
        self.register_buffer("data", weight.data)

    @property
    def weight(self) -> Packed:
        return Packed(self.data, self.packing)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., columns) -> (..., rows), in x's type."""
        return torch.nn.functional.linear(x, self.packing.expand(self.data).to(x.dtype))


class PackedEmbedding(torch.nn.Module):
    """A table of which only the rows that are asked for become numbers."""

    def __init__(self, weight: Packed, dtype: torch.dtype):
        super().__init__()
        self.packing, self.dtype = weight.packing, dtype
        self.register_buffer("data", weight.data)

    @property
    def weight(self) -> Packed:
        return Packed(self.data, self.packing)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices -> (*indices, columns) in the table's type."""
        return self.packing.rows_of(self.data, indices).to(self.dtype)


def replace_packed(network: torch.nn.Module, weights: dict, device, dtype: torch.dtype) -> dict:
    """Puts packed layers in the place of those whose weights are packed. Returns the weights that are left to load.

    What stands under two names is moved and kept once.
    """
    left, tables, moved_once = {}, {}, {}
    for name, weight in weights.items():
        if not isinstance(weight, Packed):
            if id(weight) not in moved_once:
                moved_once[id(weight)] = weight.to(device, dtype)
            left[name] = moved_once[id(weight)]
            continue
        place = name.removesuffix(".weight")
        moved = Packed(weight.data.to(device), weight.packing)
        if isinstance(network.get_submodule(place), torch.nn.Embedding):
            layer = tables.setdefault(id(weight), PackedEmbedding(moved, dtype))
        else:
            layer = PackedLinear(moved)
        network.set_submodule(place, layer)
        left[f"{place}.data"] = layer.data
    return left
