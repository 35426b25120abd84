"""LoRA, DoRA and rsLoRA on the linear layers of a PixArt.

Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353; rsLoRA, arXiv 2312.03732.
"""

import contextlib
import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..layers import Mlp
from .dropout import Chances
from .frozen import Fp8Linear, stored_weight
from .settings import TrainingSettings

# Packed projections get one adapter for each part, as the separate layers of other layouts have.
PACKED = {"qkv": 3, "kv_linear": 2}


class _AdaptedLinear(torch.autograd.Function):
    """x W' + b + scale * (x A') B', which keeps x and x A' alone for the backward pass.

    down: (parts * rank, in). up: (out, rank); part i of its rows reads part i of x A'.
    activated: x goes through GELU first, which is computed once more in the backward pass rather than kept.
    """

    @staticmethod
    def forward(ctx, x, down, up, layer, scale, parts, activated):
        rows = _activate(x, activated).reshape(-1, x.shape[-1])  # (M, in)
        out = F.linear(rows, stored_weight(layer, x.dtype), layer.bias)
        reduced = rows @ down.T  # (M, parts * rank)
        for columns, low, factor in _parts(parts, out, reduced, up):
            columns.addmm_(low, factor.T, alpha=scale)
        ctx.save_for_backward(x, down, up, reduced)
        ctx.layer, ctx.scale, ctx.parts, ctx.activated = layer, scale, parts, activated
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, down, up, reduced = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        inner, up_gradient = torch.empty_like(reduced), torch.empty_like(up)
        shares = zip(_parts(ctx.parts, gradient, reduced, up), inner.chunk(ctx.parts, 1), strict=True)
        for ((columns, low, factor), low_gradient), factor_gradient in zip(
            shares, up_gradient.chunk(ctx.parts), strict=True
        ):
            torch.mm(columns, factor, out=low_gradient)
            torch.mm(columns.T, low, out=factor_gradient)
        inner *= ctx.scale
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradient @ stored_weight(ctx.layer, x.dtype)
            x_gradient = x_gradient.addmm_(inner, down).view_as(x)
            if ctx.activated:
                x_gradient = torch.ops.aten.gelu_backward(x_gradient, x, approximate="tanh")
        down_gradient = inner.T @ _activate(x, ctx.activated).reshape(-1, x.shape[-1])
        return x_gradient, down_gradient, up_gradient.mul_(ctx.scale), None, None, None, None


def _activate(x, activated):
    return F.gelu(x, approximate="tanh") if activated else x


def _parts(parts, out, reduced, up):
    """Views of each part: columns of the output, columns of x A', rows of B."""
    return zip(out.chunk(parts, 1), reduced.chunk(parts, 1), up.chunk(parts), strict=True)


class AdaptedLinear(nn.Module):
    """A frozen linear layer and its adapter, whose weights are fp32 whatever the maths is in.

    lora_down: (parts * rank, in). lora_up: (out, rank). dora_scale: (out, 1) lengths of the weight's rows, or None.
    enabled: False computes the frozen layer alone. activated: the input goes through GELU first. number: of the layer
    in its model. chances: what tells the dropout of a forward pass; without it PyTorch draws.
    """

    def __init__(
        self, base: nn.Linear | Fp8Linear, settings: TrainingSettings, parts: int, generator=None, number: int = 0
    ):
        super().__init__()
        rank, root = settings.rank, math.sqrt(settings.rank)
        device = base.weight.device
        self.base, self.parts, self.rank = base, parts, rank
        self.scale = settings.adapter_alpha / (root if settings.rslora else rank)
        self.dropout, self.number, self.chances = settings.dropout, number, None
        self.enabled, self.activated = True, False
        bound = base.in_features**-0.5  # kaiming uniform with a = sqrt(5)
        down = torch.empty(parts * rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_down = nn.Parameter(down.to(device))
        self.lora_up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.dora_scale = None
        if settings.dora:
            lengths = stored_weight(base, torch.float32).detach().float().norm(dim=1, keepdim=True)
            self.dora_scale = nn.Parameter(lengths)

    def forward(self, x):
        """(..., in) -> (..., out)."""
        if not self.enabled:
            return self.base(_activate(x, self.activated))
        down, up = self.lora_down.to(x.dtype), self.lora_up.to(x.dtype)
        drops = self.dropout and self.training
        if not drops and self.dora_scale is None:
            return _AdaptedLinear.apply(x, down, up, self.base, self.scale, self.parts, self.activated)
        x = _activate(x, self.activated)
        reduced = F.linear(self._drop(x) if drops else x, down).chunk(self.parts, -1)
        added = torch.cat([F.linear(low, part) for low, part in zip(reduced, up.chunk(self.parts), strict=True)], -1)
        if self.dora_scale is None:
            return self.base(x) + self.scale * added
        bias = self.base.bias
        plain = self.base(x) if bias is None else self.base(x) - bias
        out = self._dora_factor().to(x.dtype) * (plain + self.scale * added)
        return out if bias is None else out + bias

    def _drop(self, x):
        return self.chances.drop(x, self.dropout, self.number) if self.chances else F.dropout(x, self.dropout)

    def _dora_factor(self) -> Tensor:
        """What each output channel is multiplied by: (out,). The lengths in its denominator are not trained."""
        with torch.no_grad():
            adapted = stored_weight(self.base, torch.float32).float() + self.delta()
            lengths = adapted.norm(dim=1)
        return self.dora_scale[:, 0] / lengths

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, before DoRA's scale: (out, in) float32."""
        pairs = zip(self.lora_up.chunk(self.parts), self.lora_down.chunk(self.parts), strict=True)
        return self.scale * torch.cat([up @ down for up, down in pairs])


class AdaptedMlp(nn.Module):
    """A feed-forward layer whose second linear layer has an adapter, and keeps the GELU before it from being stored."""

    def __init__(self, mlp: Mlp):
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2
        self.fc2.activated = True

    def forward(self, x):
        """(..., in) -> (..., out)."""
        return self.fc2(self.fc1(x))


def add_adapters(model: nn.Module, settings: TrainingSettings) -> dict[str, AdaptedLinear]:
    """Put an adapter on every linear layer whose name in the original layout matches; returns them by name.

    The model is frozen already. Raises ValueError when no layer matches.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    named = dict(model.named_modules())
    linear = [name for name, module in named.items() if isinstance(module, nn.Linear | Fp8Linear)]
    chosen = [name for name in linear if re.fullmatch(settings.pattern, name)]
    if not chosen:
        raise ValueError(
            f"No layer for the LoRA: got pattern {settings.pattern!r}, expected one that matches layers such as "
            f"{', '.join(linear[:1] + linear[-1:])}. Correct the target pattern, or choose a preset."
        )
    adapters = {}
    for number, name in enumerate(chosen):
        parent, _, attribute = name.rpartition(".")
        adapter = AdaptedLinear(named[name], settings, PACKED.get(attribute, 1), generator, number)
        setattr(named[parent], attribute, adapter)
        adapters[name] = adapter
    for name, module in named.items():
        if isinstance(module, Mlp) and isinstance(module.fc2, AdaptedLinear):
            parent, _, attribute = name.rpartition(".")
            setattr(named[parent], attribute, AdaptedMlp(module))
    return adapters


def tell_chances(model: nn.Module, chances: Chances) -> None:
    """Let all adapters in a model drop what these chances say, until others are told."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.chances = chances


@contextlib.contextmanager
def adapters_disabled(adapters: dict[str, AdaptedLinear]) -> Iterator[None]:
    """Within it the model is the frozen one."""
    for adapter in adapters.values():
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters.values():
            adapter.enabled = True
