"""Changes that depend on the weight they are made to: rotations, scalings, projections, and whole other weights."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..quoting import shorten
from .kinds import Factor, LowRank
from .names import Target


@dataclass(frozen=True, eq=False, kw_only=True)
class Relative(Factor):
    """A change of one weight that has no product of its own: `change` gives it for a weight."""

    kind: ClassVar[str]

    @property
    def rank(self):
        return None

    @property
    def is_relative(self):
        return True

    @property
    def is_whole(self):
        return True

    @property
    def product_shape(self):
        return None

    def bound(self, weight: torch.Tensor) -> "Relative":
        """The change for a model whose parameter `needs` is `weight`, without LoRAs."""
        return self

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether this can change a weight of `shape`."""
        try:
            changed = self.to("meta").change(torch.empty(shape, device="meta"))
        except (RuntimeError, IndexError):
            return False
        return tuple(changed.shape) == tuple(shape)


@dataclass(frozen=True, eq=False)
class Replacement(Relative):
    """A whole parameter that was trained, and stands in the place of the base's. values: of its shape."""

    kind: ClassVar[str] = "whole weight"
    values: torch.Tensor

    def change(self, weight):
        return self.values.to(weight.device, weight.dtype) - weight

    def fits(self, shape):
        return tuple(self.values.shape) == tuple(shape)


@dataclass(frozen=True, eq=False)
class Scaled(Relative):
    """IA3: rows or columns times numbers. values: (rows, 1) or (1, columns), (rows,) for a bias.

    Source: IA3, arXiv 2205.05638, section 3.3.
    """

    kind: ClassVar[str] = "IA3"
    values: torch.Tensor

    def change(self, weight):
        values = self.values.to(weight.device, weight.dtype)
        return weight * (values.reshape(*values.shape, *[1] * (weight.ndim - values.ndim)) - 1)


@dataclass(frozen=True, eq=False)
class Rotated(Relative):
    """OFT: blocks of columns or rows times matrices, and then rows times `lengths`.

    matrices: (blocks, size, size), or one for all blocks; new[i] = sum over j of matrix[i, j] * old[j].
    by_rows: whether blocks are of rows; otherwise of columns, a convolution's kernel among them. lengths: (rows,).
    halves: (blocks, size, size) which LyCORIS' programs make the matrices of, for files; None where they are not known.
    Source: OFT, arXiv 2306.07280, section 3.
    """

    kind: ClassVar[str] = "OFT"
    matrices: torch.Tensor
    by_rows: bool = False
    lengths: torch.Tensor | None = None
    halves: torch.Tensor | None = None

    def change(self, weight):
        matrices = self.matrices.to(weight.device, weight.dtype)
        size = matrices.shape[-1]
        if self.by_rows:
            blocks = weight.flatten(1).unflatten(0, (-1, size))  # (blocks, size, columns)
            changed = matrices @ blocks
        else:
            blocks = weight.flatten(1).unflatten(1, (-1, size))  # (rows, blocks, size)
            changed = _columns_times(blocks, matrices)
        return _with_lengths(changed.reshape(weight.shape), self.lengths) - weight

    def fits(self, shape):
        count, size, _ = self.matrices.shape
        width = shape[0] if self.by_rows else math.prod(shape[1:])
        covered = width % size == 0 if count == 1 else width == count * size
        lengths = self.lengths is None or self.lengths.numel() == shape[0]
        return len(shape) > 1 and covered and lengths


@dataclass(frozen=True, eq=False)
class Butterfly(Relative):
    """BOFT as LyCORIS has it: stages of small rotations of rows, each over rows further apart.

    matrices: (stages, blocks, size, size). lengths: (rows,), what rows are multiplied by after it, or None.
    Strength acts on every stage. Source: BOFT, arXiv 2311.06243, section 4.
    """

    kind: ClassVar[str] = "BOFT"
    matrices: torch.Tensor
    lengths: torch.Tensor | None = None

    def change(self, weight):
        return self.apply(weight) - weight

    def apply(self, weight, strength=1.0):
        matrices = self.matrices.to(weight.device, weight.dtype)
        stages, _, size, _ = matrices.shape
        identity = torch.eye(size, device=weight.device, dtype=weight.dtype)
        rows = weight.flatten(1)
        for stage in range(stages):
            apart = 2**stage * size // 2
            # rows that are `apart` from each other become neighbours, and go back after their rotation
            blocks = rows.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
            blocks = (identity + strength * (matrices[stage] - identity)) @ blocks
            rows = blocks.flatten(0, 1).unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
        lengths = None if self.lengths is None else 1 + strength * (self.lengths - 1)
        return _with_lengths(rows.reshape(weight.shape), lengths)


@dataclass(frozen=True, eq=False)
class Reflected(Relative):
    """HRA: columns reflected at one plane after another. normals: (columns, count), of any length but none of nought.

    Source: HRA, arXiv 2405.17484, section 4.
    """

    kind: ClassVar[str] = "HRA"
    normals: torch.Tensor

    def change(self, weight):
        normals = self.normals.to(weight.device, weight.dtype)
        normals = normals / normals.norm(dim=0)
        flat = weight.flatten(1)
        for normal in normals.T:
            flat = flat - 2 * torch.outer(flat @ normal, normal)
        return flat.reshape(weight.shape) - weight

    def fits(self, shape):
        columns = math.prod(shape[1:])
        few = self.normals.ndim == 2 and self.normals.shape[1] <= 4 * columns  # each takes a pass over the weight
        return len(shape) > 1 and few and self.normals.shape[0] == columns


@dataclass(frozen=True, eq=False)
class Generalized(Relative):
    """GLoRA as LyCORIS has it: weight @ a1 @ a2 + b1 @ b2, times alpha / rank.

    a1: (columns, rank), a2: (rank, columns), b1: (rows, rank), b2: (rank, columns, ...).
    Source: GLoRA, arXiv 2306.07967.
    """

    kind: ClassVar[str] = "GLoRA"
    a1: torch.Tensor
    a2: torch.Tensor
    b1: torch.Tensor
    b2: torch.Tensor

    @property
    def rank(self):
        return self.a2.shape[0]

    def change(self, weight):
        a1, a2, b1, b2 = (each.to(weight.device, weight.dtype).flatten(1) for each in self.tensors.values())
        mixed = torch.einsum("o i ..., i j -> o j ...", weight, a1 @ a2)
        return (mixed + (b1 @ b2).reshape(weight.shape)) * self.scale


@dataclass(frozen=True, eq=False)
class Shared(Relative):
    """VeRA: two matrices that all weights share, cut to the weight's shape, with a factor for each row of both.

    a: (rank, columns or more), b: (rows or more, rank); d: (rank,), e: (rows,).
    Source: VeRA, arXiv 2310.11454, equation 2.
    """

    kind: ClassVar[str] = "VeRA"
    a: torch.Tensor
    b: torch.Tensor
    d: torch.Tensor
    e: torch.Tensor

    def change(self, weight):
        a, b, d, e = (each.to(weight.device, weight.dtype) for each in self.tensors.values())
        rows, columns = weight.shape[0], weight[0].numel()
        return ((e[:, None] * b[:rows]) @ (d[:, None] * a[:, :columns])).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class Frequencies(Relative):
    """FourierFT: some numbers of the difference's spectrum. spectrum: (count,), at places that `seed` draws.

    Source: FourierFT, arXiv 2405.03003, equations 2 to 4.
    """

    kind: ClassVar[str] = "FourierFT"
    spectrum: torch.Tensor
    seed: int
    scaling: float

    def change(self, weight):
        generator = torch.Generator().manual_seed(self.seed)
        places = torch.randperm(weight.numel(), generator=generator)[: self.spectrum.numel()]
        dense = torch.zeros(weight.numel(), device=weight.device)
        dense[places.to(weight.device)] = self.spectrum.to(weight.device, torch.float32)
        return (torch.fft.ifft2(dense.reshape(weight.shape)).real * self.scaling).to(weight.dtype)

    def fits(self, shape):
        return len(shape) == 2 and 0 < self.spectrum.numel() <= shape[0] * shape[1]


@dataclass(frozen=True, eq=False)
class Started(Relative):
    """T-LoRA at full rank: a low-rank product less the one that its training began with, singular vectors of the base.

    down: (rank, columns), up: (rows, rank), values: (rank,). weight_target: the weight, whose vectors are no part of
    the file. Source: T-LoRA, arXiv 2507.05964, section 4; LyCORIS.
    """

    kind: ClassVar[str] = "T-LoRA"
    down: torch.Tensor
    up: torch.Tensor
    values: torch.Tensor
    weight_target: Target

    @property
    def rank(self):
        return self.down.shape[0]

    @property
    def needs(self):
        return self.weight_target

    def bound(self, weight):
        """The difference as a LoRA of twice the rank. Raises ValueError for another base than that of the training."""
        down, up, values = (each.to(weight.device, torch.float32) for each in (self.down, self.up, self.values))
        left, sizes, right = torch.linalg.svd(weight.float(), full_matrices=False)
        product, count, middle = (up * values) @ down, self.rank, (len(sizes) - self.rank) // 2
        starts = [slice(0, count), slice(len(sizes) - count, None), slice(middle, middle + count)]
        # The file does not say where it began: at the product that is nearest to what became of it.
        parts = [(left[:, part] * sizes[part], right[part]) for part in starts]
        distance, old_up, old_down = min(
            (((product - a @ b).norm() / (a @ b).norm(), a, b) for a, b in parts), key=lambda found: float(found[0])
        )
        if not distance < 1:
            raise ValueError(
                f"T-LoRA of another base: got a product {distance:.2g} times as far from the singular vectors of "
                f"{shorten(self.weight_target.name)} as these are long, expected less than 1. Choose the model that it "
                f"was trained on."
            )
        ends = torch.cat([down, old_down]), torch.cat([up * values, -old_up], dim=1)
        return LowRank(*ends, alpha=self.scale * 2 * count)

    def fits(self, shape):
        rows, columns = shape[0], math.prod(shape[1:])
        fitting = self.down.shape == (self.rank, columns) and self.up.shape == (rows, self.rank)
        return len(shape) == 2 and fitting and self.values.shape == (self.rank,) and self.rank <= min(shape)


def _columns_times(blocks: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    if matrices.shape[0] == 1:
        return blocks @ matrices[0].T
    return torch.einsum("r n j, n i j -> r n i", blocks, matrices)


def _with_lengths(weight: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    if lengths is None:
        return weight
    return weight * lengths.to(weight.device, weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
