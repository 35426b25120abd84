"""Small changes that are added to one weight: LoRA, LoCon, LoHa, LoKr, differences, and DoRA's magnitude over them."""

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch

from .names import Target

_TUCKER = "i j k l, j r, i p -> p r k l"  # LyCORIS' core tensor with its two factors


@dataclass(frozen=True, eq=False, kw_only=True)
class Factor:
    """A change of one weight in factors; its product times `scale` is added to the weight.

    alpha: the scale is alpha / rank, and 1 where alpha is None or there is no rank.
    magnitude: DoRA's length of each row of the changed weight, (rows, 1), or of each column, (1, columns); or None.
    """

    kind: ClassVar[str]
    alpha: float | None = None
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int | None:
        """The inner width of the factors, None for full matrices."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank

    @property
    def title(self) -> str:
        """The kind, for a message: "LoRA", "DoRA", "DoRA over LoHa"."""
        if self.magnitude is None:
            return self.kind
        return "DoRA" if self.kind == LowRank.kind else f"DoRA over {self.kind}"

    def product(self) -> torch.Tensor:
        """The factors multiplied, without the scale: (rows, columns), or with the kernel's two dimensions after it."""
        raise NotImplementedError

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The factors and the magnitude by their names, without those that are None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    @property
    def is_finite(self) -> bool:
        """Whether every number is one."""
        return all(bool(tensor.float().isfinite().all()) for tensor in self.tensors.values())

    def to(self, *args) -> "Factor":
        """The same with its tensors on another device or of another dtype, as torch.Tensor.to takes them."""
        return replace(self, **{name: tensor.to(*args) for name, tensor in self.tensors.items()})

    def delta(self, like: torch.Tensor) -> torch.Tensor:
        """What is added to a weight: of the shape, dtype and device of `like`."""
        return (self.to(like.device, like.dtype).product() * self.scale).reshape(like.shape)

    @property
    def needs(self) -> Target | None:
        """Another parameter that the change is made of; see `Relative.bound`."""
        return None

    @property
    def is_relative(self) -> bool:
        """Whether what is added depends on the weight that is changed."""
        return self.magnitude is not None

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        """What is added to this weight at full strength; (rows, columns, ...) as the weight.

        Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353, equation 5.
        """
        delta = self.delta(weight)
        return delta if self.magnitude is None else set_lengths(weight + delta, self.magnitude) - weight

    def apply(self, weight: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """The changed weight, a new tensor; strength goes from the old weight (0) to the changed one (1) and beyond."""
        return weight + strength * self.change(weight)

    @property
    def is_whole(self) -> bool:
        """Whether the factors belong together."""
        return self.product_shape is not None

    @property
    def product_shape(self) -> tuple[int, ...] | None:
        """The shape of `product`, found without computing it; None when the factors do not belong together."""
        try:
            return tuple(self.to("meta").product().shape)
        except (RuntimeError, IndexError):
            return None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether this can change a weight of `shape`."""
        product = self.product_shape
        lengths = self.magnitude
        fitting = lengths is None or _is_of_rows(lengths, shape[0]) or (lengths.numel(),) == tuple(shape[1:2])
        return bool(product) and product[0] == shape[0] and math.prod(product) == math.prod(shape) and fitting


@dataclass(frozen=True, eq=False)
class LowRank(Factor):
    """LoRA: up @ down. down: (rank, columns), up: (rows, rank), each with a kernel after it for a convolution.

    mid: LoCon's (rank, rank, kernel, kernel) between the two.
    Source: LoRA, arXiv 2106.09685; LyCORIS, arXiv 2309.14859, section 3.
    """

    kind: ClassVar[str] = "LoRA"
    down: torch.Tensor
    up: torch.Tensor
    mid: torch.Tensor | None = None

    @property
    def rank(self):
        return self.down.shape[0]

    def product(self):
        """up @ down."""
        plain = self.without_mid()
        return plain.up.flatten(1) @ plain.down.flatten(1)

    def without_mid(self) -> "LowRank":
        """The same change with the middle tensor multiplied into `down`."""
        if self.mid is None:
            return self
        return replace(self, down=torch.einsum("i j k l, j r -> i r k l", self.mid, self.down.flatten(1)), mid=None)


@dataclass(frozen=True, eq=False)
class Adaptive(LowRank):
    """AdaLoRA: LoRA whose `down` has its singular values in it.

    Source: AdaLoRA, arXiv 2303.10512; the scale is that of PEFT, whose rank is never nought.
    """

    kind: ClassVar[str] = "AdaLoRA"

    @property
    def scale(self):
        return 1.0 if self.alpha is None else self.alpha / (self.rank + 1e-5)


@dataclass(frozen=True, eq=False)
class Hadamard(Factor):
    """LoHa: (w1_a @ w1_b) * (w2_a @ w2_b), entry by entry; t1 and t2 are the core tensors of a convolution.

    Source: FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859, section 3.
    """

    kind: ClassVar[str] = "LoHa"
    w1_a: torch.Tensor
    w1_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    t1: torch.Tensor | None = None
    t2: torch.Tensor | None = None

    @property
    def rank(self):
        return self.w1_b.shape[0]

    def product(self):
        """The two low-rank matrices, multiplied entry by entry."""
        return _matrix(self.w1_a, self.w1_b, self.t1) * _matrix(self.w2_a, self.w2_b, self.t2)


@dataclass(frozen=True, eq=False)
class Kronecker(Factor):
    """LoKr: the Kronecker product of two matrices, each whole (w1, w2) or in factors (w1_a @ w1_b, w2_a @ w2_b).

    t2: the core tensor of a convolution's second matrix.
    Source: LyCORIS, arXiv 2309.14859, section 3.
    """

    kind: ClassVar[str] = "LoKr"
    w1: torch.Tensor | None = None
    w2: torch.Tensor | None = None
    w1_a: torch.Tensor | None = None
    w1_b: torch.Tensor | None = None
    w2_a: torch.Tensor | None = None
    w2_b: torch.Tensor | None = None
    t2: torch.Tensor | None = None

    @property
    def rank(self):
        """None where both matrices are whole: then the scale is 1, whatever alpha says."""
        inner = self.w2_b if self.w2 is None else self.w1_b if self.w1 is None else None
        return None if inner is None else inner.shape[0]

    def product(self):
        """The Kronecker product."""
        first = self.w1 if self.w1 is not None else self.w1_a @ self.w1_b
        second = self.w2 if self.w2 is not None else _matrix(self.w2_a, self.w2_b, self.t2)
        return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second.contiguous())


@dataclass(frozen=True, eq=False)
class Difference(Factor):
    """The whole difference of a parameter, of the parameter's shape."""

    kind: ClassVar[str] = "difference"
    values: torch.Tensor

    @property
    def rank(self):
        return None

    def product(self):
        """The difference itself."""
        return self.values


def set_lengths(weight: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """A weight whose rows, (rows, 1), or columns, (1, columns), have these lengths; those of zeros stay zeros."""
    by_rows = _is_of_rows(lengths, weight.shape[0])
    across = [dim for dim in range(weight.ndim) if dim != (0 if by_rows else 1)]
    norms = torch.linalg.vector_norm(weight, dim=across, keepdim=True)
    wanted = lengths.to(weight.device, weight.dtype).reshape(norms.shape)
    return weight * (wanted / norms.clamp_min(torch.finfo(weight.dtype).tiny))


def _is_of_rows(lengths: torch.Tensor, rows: int) -> bool:
    return lengths.shape[0] == rows and lengths.numel() == rows


def _matrix(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    return a @ b if core is None else torch.einsum(_TUCKER, core, b, a)
