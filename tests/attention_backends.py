"""PyTorch's rules (2.14) for the kernel of an attention on an NVIDIA GPU, told from shapes, types and strides."""

from typing import NamedTuple

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
VECTOR_BYTES = 16  # what the memory-efficient kernel reads at once
MASK_ALIGNMENT = 8  # numbers; it copies masks whose rows begin elsewhere
LARGE = (90, 100)  # compute capabilities at which PyTorch itself asks cuDNN first
ALONE, ALONE_LARGE = ("flash", "efficient"), ("cuDNN", "flash", "efficient")
COMFYUI = ("flash", "cuDNN", "efficient")


class Call(NamedTuple):
    """One attention: q (B, heads, N, d), k and v (B, heads, L, d), an additive mask or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None

    @property
    def is_half(self):
        return self.q.dtype in HALF

    @property
    def has_whole_rows(self):
        return all(tensor.stride(-1) == 1 for tensor in self[:3])

    @property
    def width(self):
        return self.q.shape[3]


def chosen(call: Call, capability: int, order) -> str:
    """The first backend in this order that takes the call at this compute capability, such as 80; else "math"."""
    return next((name for name in order if _TAKES[name](call, capability)), "math")


def _flash(call, capability):
    return call.mask is None and call.is_half and capability >= 80 and call.width <= 256 and call.has_whole_rows


def _cudnn(call, capability):
    fits = call.width % 8 == 0 and call.width <= (256 if capability in LARGE else 128)
    return fits and call.is_half and 80 <= capability <= 121 and call.k.shape[2] != 1 and call.has_whole_rows


def _efficient(call, capability):
    vector = VECTOR_BYTES // call.q.element_size()
    is_aligned = all(tensor.storage_offset() % vector == 0 for tensor in call[:3])
    return capability >= 80 and call.width % vector == 0 and is_aligned and call.has_whole_rows


_TAKES = {"flash": _flash, "cuDNN": _cudnn, "efficient": _efficient}


def is_read_in_place(call: Call) -> bool:
    """Whether no kernel has to copy what it is given."""
    vector = VECTOR_BYTES // call.q.element_size()
    steps = [step for tensor in call[:3] for step in tensor.stride()[:3]]
    if any(step % vector for step in steps):
        return False
    return call.mask is None or (
        call.mask.stride(-1) == 1 and all(step % MASK_ALIGNMENT == 0 for step in call.mask.stride()[:-1])
    )


def watch_attention(monkeypatch) -> list[Call]:
    """From now on every attention that PyTorch is asked for; of tensors without numbers it gives one."""
    seen, original = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **options):
        seen.append(Call(q, k, v, attn_mask))
        if q.device.type == "meta":
            return q.new_empty(*q.shape[:3], v.shape[3])
        return original(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return seen
