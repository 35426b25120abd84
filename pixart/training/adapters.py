"""LoRA, DoRA and rsLoRA on the layers of a PixArt, and the frozen weights under them.

Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353; rsLoRA, arXiv 2312.03732.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..layers import Mlp
from ..lora import Factor, LowRank, Target
from ..quoting import list_names, shorten
from ..transformer import PixArt
from .adapting.base import PackedLinear, stored_weight
from .draws import Chances
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
        rows = activate(x, activated).reshape(-1, x.shape[-1])  # (M, in)
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
        down_gradient = inner.T @ activate(x, ctx.activated).reshape(-1, x.shape[-1])
        return x_gradient, down_gradient, up_gradient.mul_(ctx.scale), None, None, None, None


def activate(x: Tensor, activated: bool) -> Tensor:
    """x, or its GELU where that is asked for."""
    return F.gelu(x, approximate="tanh") if activated else x


def _parts(parts, out, reduced, up):
    """Views of each part: columns of the output, columns of x A', rows of B."""
    return zip(out.chunk(parts, 1), reduced.chunk(parts, 1), up.chunk(parts), strict=True)


class Casts:
    """The factors of a model's adapters in the dtype of the maths, cast all at once for each of its forward passes.

    held: of the pass that runs, (down, up) by adapter; None outside of one, where each adapter casts its own.
    """

    def __init__(self, adapters: "list[AdaptedLinear]"):
        self.adapters, self.held = adapters, None

    def begin(self, model: PixArt, args) -> None:
        """Before a forward pass of the model: a hook."""
        used = [adapter for adapter in self.adapters if adapter.enabled]
        dtype, sharded = args[0].dtype, hasattr(model.blocks[0], "unshard")  # by FSDP: whole within a block alone
        if not used or sharded or dtype == used[0].lora_down.dtype:
            return
        factors = [factor for adapter in used for factor in (adapter.lora_down, adapter.lora_up)]
        cast = _CastTogether.apply(dtype, *factors)
        self.held = dict(zip(used, zip(cast[::2], cast[1::2], strict=True), strict=True))

    def end(self, *_) -> None:
        """After a forward pass, also a failed one: a hook."""
        self.held = None

    @contextlib.contextmanager
    def holding(self, held) -> Iterator[None]:
        """Within it these are held: the ones of a pass of which a part is computed again."""
        before, self.held = self.held, held
        try:
            yield
        finally:
            self.held = before


class _CastTogether(torch.autograd.Function):
    """Tensors in another dtype, in a kernel for many of them, and their gradients in their own."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return tuple(_cast(tensors, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        known = [gradient for gradient in gradients if gradient is not None]
        cast = iter(_cast(known, ctx.dtype) if known else [])
        return None, *(None if gradient is None else next(cast) for gradient in gradients)


def _cast(tensors, dtype):
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(cast, tensors)
    return cast


def casts_of(module: nn.Module) -> Casts | None:
    """Those of the adapters in a module, or None where it has none."""
    return next((each.casts for each in module.modules() if isinstance(each, AdaptedLinear)), None)


class AdaptedLinear(nn.Module):
    """A frozen linear layer and its adapter, whose weights are fp32 whatever the maths is in.

    base: Linear or PackedLinear. parts: of a packed projection, 1 of any other.
    lora_down: (parts * rank, in). lora_up: (out, rank). dora_scale: (out, 1) lengths of the weight's rows, or None.
    enabled: False computes the frozen layer alone. activated: the input goes through GELU first. number: of the layer
    in its model. chances: what decides the dropout of a forward pass; without it PyTorch draws.
    """

    def __init__(self, base: nn.Module, settings: TrainingSettings, parts: int, generator=None, number: int = 0):
        super().__init__()
        rank, root = settings.rank, math.sqrt(settings.rank)
        device, (channels, *inner) = base.weight.device, getattr(base, "shape", base.weight.shape)
        self.base, self.parts, self.rank = base, parts, rank
        self.scale = settings.adapter_alpha / (root if settings.rslora else rank)
        self.dropout, self.number, self.chances = settings.dropout, number, None
        self.enabled, self.activated, self.casts = True, False, None
        bound = math.prod(inner) ** -0.5  # kaiming uniform with a = sqrt(5)
        down = torch.empty(parts * rank, *inner).uniform_(-bound, bound, generator=generator)
        self.lora_down = nn.Parameter(down.to(device))
        self.lora_up = nn.Parameter(torch.zeros(channels, rank, *[1] * len(inner[1:]), device=device))
        self.dora_scale = None
        if settings.dora:
            self.dora_scale = nn.Parameter(self._frozen_matrix().norm(dim=1, keepdim=True))

    def forward(self, x):
        """(..., in) -> (..., out)."""
        if not self.enabled:
            return self.base(activate(x, self.activated))
        if torch.compiler.is_compiling():  # which decides itself what it keeps for the backward pass
            return self._adapt(activate(x, self.activated))
        if self.dora_scale is None and not (self.dropout and self.training):
            down, up = self.factors(x.dtype)
            return _AdaptedLinear.apply(x, down, up, self.base, self.scale, self.parts, self.activated)
        return self._adapt(activate(x, self.activated))

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """lora_down and lora_up in a dtype: those that are cast for the forward pass, if they are."""
        if torch.compiler.is_compiling():  # what is held would be a graph of its own for each adapter
            return self.lora_down.to(dtype), self.lora_up.to(dtype)
        held = self.casts.held.get(self) if self.casts is not None and self.casts.held is not None else None
        if held is not None and held[0].dtype == dtype:
            return held
        return self.lora_down.to(dtype), self.lora_up.to(dtype)

    def _adapt(self, x):
        """The layer with its adapter by autograd, dropout and DoRA included."""
        drops = self.dropout and self.training
        added = self.scale * self._change(self._drop(x) if drops else x)
        if self.dora_scale is None:
            return self.base(x) + added
        shape = [-1, *[1] * (self.lora_down.ndim - 2)]  # behind a convolution's channels are rows and columns
        factor, bias = self._dora_factor().to(x.dtype).view(shape), self.base.bias
        if bias is None:
            return factor * (self.base(x) + added)
        bias = bias.view(shape)
        return factor * (self.base(x) - bias + added) + bias

    def _change(self, x):
        """What the adapter adds to the output, without the scale."""
        down, up = self.factors(x.dtype)
        reduced = F.linear(x, down).chunk(self.parts, -1)
        return torch.cat([F.linear(low, part) for low, part in zip(reduced, up.chunk(self.parts), strict=True)], -1)

    def _drop(self, x):
        return self.chances.drop(x, self.dropout, self.number) if self.chances else F.dropout(x, self.dropout)

    def _dora_factor(self) -> Tensor:
        """What each output channel is multiplied by: (out,). The lengths in its denominator are not trained."""
        with torch.no_grad():
            lengths = (self._frozen_matrix() + self.delta()).norm(dim=1)
        return self.dora_scale[:, 0] / lengths

    def _frozen_matrix(self) -> Tensor:
        """The frozen weight: (out, in) float32, of a convolution (out, in * kernel)."""
        return stored_weight(self.base, torch.float32).detach().float().flatten(1)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, before DoRA's scale: (out, in) float32, as _frozen_matrix has it."""
        pairs = zip(self.lora_up.chunk(self.parts), self.lora_down.chunk(self.parts), strict=True)
        return self.scale * torch.cat([up.flatten(1) @ down.flatten(1) for up, down in pairs])

    def changes(self, name: str, given: Mapping[str, Tensor]) -> dict[Target, Factor]:
        """The change of each part of the weight of the layer `name`, out of the adapter's tensors by their names."""
        lengths = given.get("dora_scale")
        shares = zip(given["lora_down"].chunk(self.parts), given["lora_up"].chunk(self.parts), strict=True)
        factors = {}
        for part, (down, up) in enumerate(shares):
            magnitude = None if lengths is None else lengths.chunk(self.parts)[part]
            target = Target(f"{name}.weight", part, self.parts)
            factors[target] = LowRank(down=down, up=up, alpha=self.scale * self.rank, magnitude=magnitude)
        return factors


class AdaptedConv(AdaptedLinear):
    """A frozen convolution and its adapter: one with the same kernel to `rank` channels, and one of a pixel from them.

    lora_down: (rank, in, kernel, kernel). lora_up: (out, rank, 1, 1).
    """

    def forward(self, x):
        """(B, in, H, W) -> (B, out, H', W')."""
        return self._adapt(x) if self.enabled else self.base(x)

    def _change(self, x):
        base, (down, up) = self.base, self.factors(x.dtype)
        return F.conv2d(F.conv2d(x, down, None, base.stride, base.padding, base.dilation), up)

    def _drop(self, x):
        return super()._drop(x.flatten(1, 2)).view_as(x)  # each picture as (rows, columns)


class AdaptedMlp(nn.Module):
    """A feed-forward layer whose second linear layer has an adapter, and keeps the GELU before it from being stored."""

    def __init__(self, mlp: Mlp):
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2
        self.fc2.activated = True

    def forward(self, x):
        """(..., in) -> (..., out)."""
        return self.fc2(self.fc1(x))


def add_adapters(
    model: PixArt,
    settings: TrainingSettings,
    linear: type[AdaptedLinear] = AdaptedLinear,
    convolution: type[AdaptedLinear] | None = AdaptedConv,
) -> dict[str, AdaptedLinear]:
    """Put an adapter on every linear layer whose name in the original layout matches; returns them by name.

    linear, convolution: of which class. A custom pattern may match the patch embedding's convolution, too,
    `x_embedder.proj`, unless there is none for it.
    The model is frozen already. Raises ValueError when no layer matches.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    named = dict(model.named_modules())
    takes_conv = settings.targets == "custom" and convolution is not None
    kinds = (nn.Linear, PackedLinear, nn.Conv2d) if takes_conv else (nn.Linear, PackedLinear)
    known = [name for name, module in named.items() if isinstance(module, kinds) and not _is_grouped(module)]
    chosen = [name for name in known if re.fullmatch(settings.pattern, name)]
    if not chosen:
        raise ValueError(
            f"No layer for the LoRA: got pattern {shorten(settings.pattern)}, expected one that matches whole names of "
            f"layers such as {list_names(known[:1] + known[-1:])}. Correct the target pattern, or choose a preset."
        )
    adapters: dict[str, AdaptedLinear] = {}
    for number, name in enumerate(chosen):
        parent, _, attribute = name.rpartition(".")
        kind = convolution if isinstance(named[name], nn.Conv2d) else linear
        adapter = kind(named[name], settings, PACKED.get(attribute, 1), generator, number)
        setattr(named[parent], attribute, adapter)
        adapters[name] = adapter
    for name, module in named.items():
        if isinstance(module, Mlp) and isinstance(module.fc2, AdaptedLinear):
            parent, _, attribute = name.rpartition(".")
            setattr(named[parent], attribute, AdaptedMlp(module))
    casts = Casts([adapter for adapter in adapters.values() if hasattr(adapter, "lora_down")])
    for adapter in casts.adapters:
        adapter.casts = casts
    model.register_forward_pre_hook(casts.begin)
    model.register_forward_hook(casts.end, always_call=True)
    return adapters


def _is_grouped(layer: nn.Module) -> bool:
    """Whether it convolves each channel alone, as the compression of keys and values does: there is no low rank."""
    return getattr(layer, "groups", 1) > 1


def tell_chances(model: nn.Module, chances: Chances) -> None:
    """Let all adapters in a model drop what these chances say, until others are given."""
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
