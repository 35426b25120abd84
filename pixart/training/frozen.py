"""The weights that training does not touch: in the dtype of the maths, or in 8 bits."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_FP8 = torch.float8_e4m3fn
_FP8_LIMIT = torch.finfo(_FP8).max
_SMALLEST_SCALE = 1e-12  # of a row of zeros


def stored_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight for maths in `dtype`: (out, in); an 8-bit one is unpacked, any other is as it is."""
    return layer.unpack(dtype) if isinstance(layer, Fp8Linear) else layer.weight


class Fp8Linear(nn.Module):
    """A frozen linear layer in 8 bits, with one scale for each output channel; computes in the input's dtype."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1, keepdim=True) / _FP8_LIMIT).clamp(min=_SMALLEST_SCALE)  # (out, 1)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", (weight / scale).to(_FP8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`: (out, in)."""
        return self.weight.to(dtype) * self.scale.to(dtype)

    def forward(self, x):
        """(..., in) -> (..., out)."""
        out = _Fp8Product.apply(x, self)
        return out if self.bias is None else out + self.bias


class _Fp8Product(torch.autograd.Function):
    """x W', which unpacks W once more in the backward pass rather than to keep the copy."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x @ layer.unpack(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient @ ctx.layer.unpack(gradient.dtype), None


def freeze(model: nn.Module, dtype: torch.dtype, base_dtype: str = "same") -> nn.Module:
    """Freeze a model in place and cast it to `dtype`; "fp8" packs the linear layers of its blocks.

    The layers around the blocks are 4 % of the weights and every token passes them: they stay in `dtype`.
    """
    model.requires_grad_(False).to(dtype)
    if base_dtype == "fp8":
        for parent in [module for block in model.blocks for module in block.modules()]:
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Fp8Linear(child))
    return model
