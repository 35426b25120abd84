"""A weight that stays in its file's blocks, and becomes numbers where it is used."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .blocks import PLAIN_TYPES, BlockType

_NUMBERS_AT_ONCE = 2**23  # while they are expanded they take several times their place


@dataclass(frozen=True)
class Packing:
    """How the bytes of a weight are to be read. pieces: (type, rows), one below the other. columns: of every row."""

    pieces: tuple[tuple[BlockType, int], ...]
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return sum(rows for _, rows in self.pieces), self.columns

    @property
    def nbytes(self) -> int:
        return sum(rows * self.row_bytes(kind) for kind, rows in self.pieces)

    def row_bytes(self, kind: BlockType) -> int:
        return self.columns // kind.count * kind.size

    def expand(self, data: torch.Tensor) -> torch.Tensor:
        """(nbytes,) uint8 -> (rows, columns) float32, on the same device."""
        numbers = torch.empty(self.shape, dtype=torch.float32, device=data.device)
        rest, first = data, 0
        for kind, rows in self.pieces:
            size = self.row_bytes(kind)
            own, rest = rest[: rows * size].reshape(rows, size), rest[rows * size :]
            for part in own.split(max(_NUMBERS_AT_ONCE // self.columns, 1)):
                expanded = kind.expand(part.reshape(-1, kind.size))
                numbers[first : first + len(part)] = expanded.reshape(len(part), self.columns)
                first += len(part)
        return numbers

    def rows_of(self, data: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The rows of these indices alone, (*indices, columns) float32."""
        if len(self.pieces) > 1:
            return self.expand(data)[indices]
        kind = self.pieces[0][0]
        rows = data.reshape(-1, self.row_bytes(kind))[indices.flatten()]
        return kind.expand(rows.reshape(-1, kind.size)).reshape(*indices.shape, self.columns)


@dataclass(frozen=True)
class Packed:
    """A weight of two dimensions in blocks. data: (packing.nbytes,) uint8. It answers as a tensor of its shape does,
    as far as readers of weights ask; `expand` makes one of it.
    """

    data: torch.Tensor
    packing: Packing
    dtype = torch.float16  # what it stands for where only a type is asked for
    ndim = 2

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.packing.shape)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def numel(self) -> int:
        return math.prod(self.packing.shape)

    nelement = numel

    def is_floating_point(self) -> bool:
        return True

    def expand(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as numbers."""
        return self.packing.expand(self.data).to(dtype)


def join_rows(weights: Sequence) -> Packed:
    """Weights one below the other, packed ones as they are, others by their own type. Raises RuntimeError, as torch's
    cat does, for those of different widths.
    """
    data, pieces = [], []
    if len({tuple(weight.shape[1:]) for weight in weights}) > 1:
        raise RuntimeError("weights of different widths")
    for weight in weights:
        if isinstance(weight, Packed):
            data.append(weight.data)
            pieces += weight.packing.pieces
        else:
            data.append(weight.contiguous().flatten().view(torch.uint8))
            pieces.append((PLAIN_TYPES[weight.dtype], weight.shape[0]))
    return Packed(torch.cat(data), Packing(tuple(pieces), weights[0].shape[1]))


def expand_all(weights: dict, dtype: torch.dtype = torch.float32) -> dict:
    """The same with every packed weight as numbers."""
    return {name: weight.expand(dtype) if isinstance(weight, Packed) else weight for name, weight in weights.items()}
