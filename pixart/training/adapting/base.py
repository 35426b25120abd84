"""Frozen linear layers in few bits: one byte or half a byte for each weight, unpacked where they are used."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_FP8 = torch.float8_e4m3fn
_FP8_LIMIT, _INT8_LIMIT = torch.finfo(_FP8).max, 127
_SMALLEST_SCALE = 1e-12  # of a row of zeros
NF4_BLOCK = 64  # weights that have a scale in common
# The quantiles of a normal distribution. Source: QLoRA, arXiv 2305.14314, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def stored_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight for maths in `dtype`: (out, in); a packed one is unpacked, any other is as it is."""
    return layer.unpack(dtype) if isinstance(layer, PackedLinear) else layer.weight


class PackedLinear(nn.Module):
    """A frozen linear layer in few bits, that computes in the input's dtype. shape: (out, in) of its weight."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.shape = linear.weight.shape
        for name, value in self.pack(linear.weight.detach().float()).items():
            self.register_buffer(name, value)
        self.bias = linear.bias

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for a weight, (out, in) fp32, `weight` among them."""
        raise NotImplementedError

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`: (out, in)."""
        raise NotImplementedError

    def forward(self, x):
        """(..., in) -> (..., out)."""
        out = _PackedProduct.apply(x, self)
        return out if self.bias is None else out + self.bias


class _PackedProduct(torch.autograd.Function):
    """x W', which unpacks W once more in the backward pass rather than to keep the copy."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x @ layer.unpack(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient @ ctx.layer.unpack(gradient.dtype), None


class Fp8Linear(PackedLinear):
    """In 8 bits, with one scale for each output channel."""

    def pack(self, weight):
        scale = (weight.abs().amax(1, keepdim=True) / _FP8_LIMIT).clamp(min=_SMALLEST_SCALE)  # (out, 1)
        return {"weight": (weight / scale).to(_FP8), "scale": scale}

    def unpack(self, dtype):
        return self.weight.to(dtype) * self.scale.to(dtype)


class Int8Linear(Fp8Linear):
    """In whole numbers of 8 bits, with one scale for each output channel."""

    def pack(self, weight):
        scale = (weight.abs().amax(1, keepdim=True) / _INT8_LIMIT).clamp(min=_SMALLEST_SCALE)  # (out, 1)
        return {"weight": (weight / scale).round().to(torch.int8), "scale": scale}


class Nf4Linear(PackedLinear):
    """In 4 bits, each one of 16 quantiles of a normal distribution times the largest of its NF4_BLOCK neighbours.

    weight: (bytes,) uint8, two weights a byte, the first in its upper half, as bitsandbytes has them. scale: (blocks,).
    """

    def pack(self, weight):
        flat = weight.flatten()
        blocks = nn.functional.pad(flat, (0, -len(flat) % NF4_BLOCK)).unflatten(0, (-1, NF4_BLOCK))
        scale = blocks.abs().amax(1)
        codes = torch.tensor(NF4, device=weight.device)
        shares = blocks / scale.clamp(min=_SMALLEST_SCALE)[:, None]
        number = torch.bucketize(shares, (codes[1:] + codes[:-1]) / 2).to(torch.uint8).flatten()
        return {"weight": number[::2] << 4 | number[1::2], "scale": scale, "codes": codes}

    def unpack(self, dtype):
        number = torch.stack((self.weight >> 4, self.weight & 15), 1)
        values = self.codes[number.int()].view(-1, NF4_BLOCK) * self.scale[:, None]
        return values.flatten()[: self.shape.numel()].view(self.shape).to(dtype)


BASES = {"fp8": Fp8Linear, "int8": Int8Linear, "nf4": Nf4Linear}


def freeze(model: nn.Module, dtype: torch.dtype, base_dtype: str = "same") -> nn.Module:
    """Freeze a model in place and cast it to `dtype`; one of BASES packs the linear layers of its blocks.

    The layers around the blocks are 4 % of the weights and every token passes them: they stay in `dtype`.
    """
    model.requires_grad_(False).to(dtype)
    if base_dtype in BASES:
        for parent in [module for block in model.blocks for module in block.modules()]:
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, BASES[base_dtype](child))
    return model
