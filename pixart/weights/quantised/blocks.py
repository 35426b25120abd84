"""The block types of GGUF as numbers, on any device: the same float32 as `gguf.quants.dequantize`, bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockType:
    """count numbers lie in size bytes. expand: (n, size) uint8 -> (n, count) float32. plain: the type of what is
    stored as numbers, None for what is packed.
    """

    name: str
    count: int
    size: int
    expand: Callable[[torch.Tensor], torch.Tensor]
    plain: torch.dtype | None = None


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _split(values: torch.Tensor, parts: int, bits: int) -> torch.Tensor:
    """(n, groups, width) bytes -> (n, groups, parts, width): that many of `bits` bits out of each, the lowest first."""
    shifts = torch.arange(0, parts * bits, bits, dtype=torch.uint8, device=values.device).reshape(1, 1, parts, 1)
    return (values[:, :, None] >> shifts) & (2**bits - 1)


def _nibbles(values: torch.Tensor) -> torch.Tensor:
    return torch.cat((values & 15, values >> 4), 1)


def _bits(values: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=values.device)
    return ((values[:, :, None] >> shifts) & 1).flatten(1)


def _signed(values: torch.Tensor, offset: int) -> torch.Tensor:
    return (values.to(torch.int8) - offset).float()


def _q4_0(blocks):
    return _half(blocks, 0) * _signed(_nibbles(blocks[:, 2:]), 8)


def _q4_1(blocks):
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks):
    return _half(blocks, 0) * _signed(_nibbles(blocks[:, 6:]) | (_bits(blocks[:, 2:6]) << 4), 16)


def _q5_1(blocks):
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | (_bits(blocks[:, 4:8]) << 4)).float() + _half(blocks, 2)


def _q8_0(blocks):
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _q2_k(blocks):
    scales = blocks[:, :16]
    factors = (_half(blocks, 80) * (scales & 15).float())[:, :, None]
    offsets = (_half(blocks, 82) * (scales >> 4).float())[:, :, None]
    values = _split(blocks[:, 16:80].reshape(-1, 2, 32), 4, 2).reshape(-1, 16, 16).float()
    return (factors * values - offsets).flatten(1)


def _q3_k(blocks):
    scales = blocks[:, 96:108]
    low = _split(scales[:, None, :8], 2, 4).reshape(-1, 16)
    high = _split(scales[:, None, 8:], 4, 2).reshape(-1, 16)
    factors = (_half(blocks, 108) * _signed(low | (high << 4), 32))[:, :, None]
    values = _split(blocks[:, 32:96].reshape(-1, 2, 32), 4, 2).reshape(-1, 16, 16)
    missing = (_split(blocks[:, None, :32], 8, 1) ^ 1).reshape(-1, 16, 16) << 2
    return (factors * (values.to(torch.int8) - missing.to(torch.int8)).float()).flatten(1)


def _scales_and_offsets(blocks):
    """Of Q4_K and Q5_K: (n, 8, 1) each, six bits a group in twelve bytes."""
    low, high, rest = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scales = torch.cat((low & 63, (rest & 15) | ((low >> 2) & 48)), 1).float()
    offsets = torch.cat((high & 63, (rest >> 4) | ((high >> 2) & 48)), 1).float()
    return (_half(blocks, 0) * scales)[:, :, None], (_half(blocks, 2) * offsets)[:, :, None]


def _q4_k(blocks):
    factors, offsets = _scales_and_offsets(blocks)
    values = _split(blocks[:, 16:].reshape(-1, 4, 32), 2, 4).reshape(-1, 8, 32).float()
    return (factors * values - offsets).flatten(1)


def _q5_k(blocks):
    factors, offsets = _scales_and_offsets(blocks)
    high = _split(blocks[:, None, 16:48], 8, 1).reshape(-1, 8, 32)
    low = _split(blocks[:, 48:].reshape(-1, 4, 32), 2, 4).reshape(-1, 8, 32)
    return (factors * (low | (high << 4)).float() - offsets).flatten(1)


def _q6_k(blocks):
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    low = _split(blocks[:, :128].reshape(-1, 2, 64), 2, 4).reshape(-1, 8, 32)
    high = _split(blocks[:, 128:192].reshape(-1, 2, 32), 4, 2).reshape(-1, 8, 32)
    values = _signed(low | (high << 4), 32).reshape(-1, 16, 16)
    return ((_half(blocks, 208) * scales)[:, :, None] * values).flatten(1)


def _by_table(codes):
    return torch.tensor(_IQ4, dtype=torch.float32, device=codes.device)[codes.int()]


def _iq4_nl(blocks):
    return _half(blocks, 0) * _by_table(_nibbles(blocks[:, 2:]))


def _iq4_xs(blocks):
    low = _split(blocks[:, 4:8, None], 2, 4).reshape(-1, 8)
    high = _split(blocks[:, 2:4, None], 4, 2).reshape(-1, 8)
    factors = (_half(blocks, 0) * _signed(low | (high << 4), 32))[:, :, None]
    values = _by_table(_split(blocks[:, 8:].reshape(-1, 8, 16), 2, 4).reshape(-1, 8, 32))
    return (factors * values).flatten(1)


def _plain(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda blocks: blocks.contiguous().view(dtype).float()


# Number of a type in a file -> the type. Those that are missing here only the package `gguf` knows.
BLOCK_TYPES = {
    0: BlockType("F32", 1, 4, _plain(torch.float32), torch.float32),
    1: BlockType("F16", 1, 2, _plain(torch.float16), torch.float16),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl),
    23: BlockType("IQ4_XS", 256, 136, _iq4_xs),
    30: BlockType("BF16", 1, 2, _plain(torch.bfloat16), torch.bfloat16),
}
PLAIN_TYPES = {kind.plain: kind for kind in BLOCK_TYPES.values() if kind.plain is not None}
