"""The host's layers over weights in blocks: they stay packed in memory, and become numbers where they are used.

The host moves, offloads and counts the packed bytes. A weight that a LoRA or a merge changes is kept as numbers while
it is changed.
"""

from collections.abc import Iterable

import comfy.model_management
import comfy.ops
import torch

from ....pixart.weights.quantised.packed import Packed, Packing


class _PackedWeight(comfy.ops.CastWeightBiasOp):
    """Mixed into a layer. packing: how its weight's bytes are read; None where the file had it as numbers."""

    comfy_cast_weights = True
    packing: Packing | None = None
    numbers_dtype = torch.float16

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        own = {name: state_dict[f"{prefix}{name}"] for name in ("weight", "bias") if f"{prefix}{name}" in state_dict}
        weight = own.get("weight")
        if isinstance(weight, Packed):
            if tuple(weight.shape) != self.plain_shape():
                raise RuntimeError(
                    f"size mismatch for {prefix}weight: got {tuple(weight.shape)}, not {self.plain_shape()}"
                )
            self.packing, own["weight"] = weight.packing, weight.data
        # Assigned here: the layers are built without memory, and the host copies into what is there.
        for name, tensor in own.items():
            setattr(self, name, torch.nn.Parameter(tensor, requires_grad=False))
        super()._load_from_state_dict(
            {**state_dict, **{f"{prefix}{name}": tensor for name, tensor in own.items()}}, prefix, *rest
        )

    def is_packed(self) -> bool:
        """Whether the weight is bytes now: not while a LoRA is merged into it."""
        return self.packing is not None and self.weight.dtype == torch.uint8

    def convert_weight(self, weight, inplace=False, **_):
        """What the host calls before it changes a weight: bytes, of whatever type it has cast them to, as numbers."""
        packed = self.packing is not None and weight.ndim == 1
        return self.packing.expand(weight.to(torch.uint8)) if packed else weight

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **_):
        """Takes a changed weight, or gives it back in the type that it is kept in. Bytes make room for numbers even
        where the host asks for a change in place; its patcher puts them back.
        """
        weight = weight.to(self.numbers_dtype)
        if return_weight:
            return weight
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        return None

    def _numbers(self, device, dtype):
        weight = comfy.model_management.cast_to(self.weight, None, device)
        if self.is_packed():
            weight = self.packing.expand(weight)
        weight = weight.to(dtype)
        for change in self.weight_function:
            weight = change(weight)
        return weight

    def _bias(self, device, dtype):
        if self.bias is None:
            return None
        bias = comfy.model_management.cast_to(self.bias, dtype, device)
        for change in self.bias_function:
            bias = change(bias)
        return bias


class _Linear(_PackedWeight, comfy.ops.manual_cast.Linear):
    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=dtype)

    def plain_shape(self):
        return self.out_features, self.in_features

    def forward(self, input):
        comfy.ops.run_every_op()
        weight, bias = self._numbers(input.device, input.dtype), self._bias(input.device, input.dtype)
        return torch.nn.functional.linear(input, weight, bias)


class _Embedding(_PackedWeight, comfy.ops.manual_cast.Embedding):
    def __init__(self, num_embeddings, embedding_dim, *args, device=None, dtype=None, **fields):
        super().__init__(num_embeddings, embedding_dim, *args, device="meta", dtype=dtype, **fields)
        self.bias = None

    def plain_shape(self):
        return self.num_embeddings, self.embedding_dim

    def forward(self, input, out_dtype=None):
        comfy.ops.run_every_op()
        dtype = out_dtype or torch.float32
        if self.is_packed() and not self.weight_function:  # of a large table few rows are wanted
            rows = self.packing.rows_of(comfy.model_management.cast_to(self.weight, None, input.device), input)
            return rows.to(dtype)
        return torch.nn.functional.embedding(input, self._numbers(input.device, dtype))


class PackedOperations(comfy.ops.manual_cast):
    """The host's operations, with layers that can be packed."""

    Linear = _Linear
    Embedding = _Embedding


def is_packed(state_dict) -> bool:
    """Whether any weight in it is packed."""
    return any(isinstance(weight, Packed) for weight in state_dict.values())


def packed_layers(module: torch.nn.Module) -> list:
    """The layers of a model whose weights lie in blocks."""
    return [layer for layer in module.modules() if getattr(layer, "packing", None) is not None]


def describe_packing(module: torch.nn.Module) -> str:
    """The block types of a model, the commonest first; "" for one without."""
    return name_kinds(layer.packing for layer in packed_layers(module))


def name_kinds(packings: Iterable[Packing]) -> str:
    """The block types of weights, that of most numbers first."""
    numbers: dict[str, int] = {}
    for packing in packings:
        for kind, rows in packing.pieces:
            numbers[kind.name] = numbers.get(kind.name, 0) + rows * packing.columns
    return ", ".join(sorted(numbers, key=numbers.get, reverse=True))


def count_numbers(module: torch.nn.Module) -> int:
    """The parameters of a model, packed ones counted as the numbers that they are."""
    hidden = sum(
        layer.packing.shape[0] * layer.packing.columns - layer.weight.numel()
        for layer in packed_layers(module)
        if layer.is_packed()
    )
    return hidden + sum(parameter.numel() for parameter in module.parameters())
