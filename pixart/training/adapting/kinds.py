"""LoHa, LoKr and OFT on linear layers, as trained kinds beside LoRA.

Source: LoHa and LoKr, LyCORIS, arXiv 2309.14859, section 3; OFT, arXiv 2306.07280, section 3, in blocks of rows.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...lora import Factor, Hadamard, Kronecker, Target
from ...lora.relative import Rotated
from ...transformer import PixArt
from ..adapters import AdaptedConv, AdaptedLinear, activate
from ..adapters import add_adapters as add_chosen
from ..settings import TrainingSettings


class OtherLinear(AdaptedLinear):
    """A frozen linear layer and an adapter of another kind. All parts of a packed projection have factors of their own.

    rows, columns: of a part's weight. Parameters have the parts in front.
    """

    def __init__(self, base: nn.Module, settings: TrainingSettings, parts: int, generator=None, number: int = 0):
        nn.Module.__init__(self)
        self.base, self.parts, self.rank = base, parts, settings.rank
        self.scale, self.dora_scale = settings.adapter_alpha / settings.rank, None
        self.dropout, self.number, self.chances = settings.dropout, number, None
        self.enabled, self.activated, self.casts = True, False, None
        self.rows, self.columns = base.out_features // parts, base.in_features
        for name, value in self.begin(settings, generator).items():
            setattr(self, name, nn.Parameter(value.to(base.weight.device)))

    def begin(self, settings: TrainingSettings, generator: torch.Generator | None) -> dict[str, Tensor]:
        """The parameters by their names, that change nothing together."""
        raise NotImplementedError

    def forward(self, x):
        """(..., in) -> (..., out)."""
        x = activate(x, self.activated)
        if not self.enabled:
            return self.base(x)
        return self.base(x) + self._change(self._drop(x) if self.dropout and self.training else x)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight: (out, in) float32."""
        given = {name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)}
        return torch.cat([factor.product() * factor.scale for factor in self.changes("", given).values()])

    def changes(self, name: str, given: Mapping[str, Tensor]) -> dict[Target, Factor]:
        shares = [{key: value[part] for key, value in given.items()} for part in range(self.parts)]
        return {Target(f"{name}.weight", part, self.parts): self.factor(share) for part, share in enumerate(shares)}

    def factor(self, given: Mapping[str, Tensor]) -> Factor:
        """The change of a part out of its tensors."""
        raise NotImplementedError


class HadamardLinear(OtherLinear):
    """LoHa: the product, entry by entry, of two low-rank matrices."""

    def begin(self, settings, generator):
        rank, parts = settings.rank, self.parts

        def draw(*shape, deviation):
            return torch.randn(parts, *shape, generator=generator) * deviation

        return {
            "w1_a": draw(self.rows, rank, deviation=0.1),
            "w1_b": draw(rank, self.columns, deviation=1.0),
            "w2_a": torch.zeros(parts, self.rows, rank),
            "w2_b": draw(rank, self.columns, deviation=1.0),
        }

    def _change(self, x):
        # The matrix is made once more in the backward pass: kept, those of all layers would take a model's memory.
        if torch.is_grad_enabled():
            return checkpoint(self._times_matrix, x, use_reentrant=False, preserve_rng_state=False)
        return self._times_matrix(x)

    def _times_matrix(self, x):
        matrix = (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b) * self.scale  # (parts, rows, columns)
        return F.linear(x, matrix.flatten(0, 1).to(x.dtype))

    def factor(self, given):
        return Hadamard(alpha=self.scale * self.rank, **given)


class KroneckerLinear(OtherLinear):
    """LoKr: the Kronecker product of a small matrix and one of low rank, which is whole where the rank is no saving.

    Then there is no scale.
    """

    def begin(self, settings, generator):
        (few_rows, many_rows), (few, many) = (
            factorize(size, settings.lokr_factor) for size in (self.rows, self.columns)
        )

        def draw(rows, columns):
            bound = columns**-0.5  # kaiming uniform with a = sqrt(5)
            return torch.empty(self.parts, rows, columns).uniform_(-bound, bound, generator=generator)

        if settings.rank >= max(many_rows, many) / 2:
            self.scale = 1.0
            return {"w1": draw(few_rows, few), "w2": torch.zeros(self.parts, many_rows, many)}
        low = {"w2_a": draw(many_rows, settings.rank), "w2_b": torch.zeros(self.parts, settings.rank, many)}
        return {"w1": draw(few_rows, few), **low}

    def _change(self, x):
        names = ("w2_a", "w2_b") if hasattr(self, "w2_a") else ("w2",)
        steps = [getattr(self, name).to(x.dtype) for name in names][::-1]
        first = (self.w1 * self.scale).to(x.dtype)
        cut = x.unflatten(-1, (first.shape[-1], -1))  # (..., few, many)
        outputs = []
        for part in range(self.parts):
            inner = cut
            for step in steps:
                inner = F.linear(inner, step[part])
            outputs.append((first[part] @ inner).flatten(-2))  # (..., rows)
        return torch.cat(outputs, -1)

    def factor(self, given):
        return Kronecker(alpha=self.scale * self.rank, **given)


class RotatedLinear(OtherLinear):
    """OFT: blocks of rows of the weight are rotated, by Cayley's transform of skew matrices; as LyCORIS' Diag-OFT.

    What is rotated is the layer's output without its bias, which is the same.
    """

    def begin(self, settings, generator):
        size = factorize(self.rows, settings.rank)[0]
        return {"blocks": torch.zeros(self.parts, self.rows // size, size, size)}

    def forward(self, x):
        x = activate(x, self.activated)
        out = self.base(x)
        if not self.enabled:
            return out
        bias = self.base.bias
        out = out if bias is None else out - bias
        turned = self._rotations().flatten(0, 1).to(out.dtype)  # (blocks, size, size)
        blocks = out.unflatten(-1, (len(turned), -1))  # (..., blocks, size)
        out = torch.einsum("knm,...kn->...km", turned, blocks).flatten(-2)
        return out if bias is None else out + bias

    def _rotations(self) -> Tensor:
        """(parts, blocks, size, size) float32, by whose transposes rows are multiplied."""
        skew = self.blocks - self.blocks.mT
        identity = torch.eye(skew.shape[-1], device=skew.device)
        # (I + S) and the inverse of (I - S) are functions of one matrix, and commute.
        return torch.linalg.solve(identity - skew, identity + skew)

    def factor(self, given):
        skew = (given["blocks"] - given["blocks"].mT).float()
        identity = torch.eye(skew.shape[-1], device=skew.device)
        turned = torch.linalg.solve(identity - skew, identity + skew)
        return Rotated(turned.mT, by_rows=True, halves=given["blocks"])


KINDS = {"loha": HadamardLinear, "lokr": KroneckerLinear, "oft": RotatedLinear}


def add_adapters(model: PixArt, settings: TrainingSettings) -> dict[str, AdaptedLinear]:
    """Put an adapter of the kind that the settings name on every layer that they choose; see adapters.add_adapters."""
    if settings.adapter in KINDS:
        return add_chosen(model, settings, KINDS[settings.adapter], None)
    return add_chosen(model, settings, AdaptedLinear, AdaptedConv)


def factorize(size: int, largest: int) -> tuple[int, int]:
    """(a, b) whose product is `size`, the first the greatest divisor that is neither above its root nor `largest`.

    largest: 0 for no such bound.
    """
    few = math.isqrt(size) if largest == 0 else min(largest, math.isqrt(size))
    while size % few:
        few -= 1
    return few, size // few
