"""8 and 4 bit weights of other programs in blocks, as GGUF has them: each scale in front of the numbers that it scales.

So they stay packed in memory and become the same float32 as the formulas make of them, bit for bit.
"""

import torch

from .blocks import BlockType
from .packed import Packed, Packing

_SCALE = 4  # bytes of a float32


def pack_scaled(weight: torch.Tensor, scale: torch.Tensor) -> Packed | None:
    """weight: (rows, columns) int8 or float8. scale: of all, of each row, or (rows, groups) of equal parts of a row.

    None for scales of another shape.
    """
    rows, columns = weight.shape
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(rows, 1)
    elif scale.ndim == 1:
        scale = scale[:, None]
    if scale.ndim != 2 or scale.shape[0] != rows or not scale.shape[1] or columns % scale.shape[1]:
        return None
    count, dtype = columns // scale.shape[1], weight.dtype

    def expand(blocks: torch.Tensor) -> torch.Tensor:
        factors = blocks[:, :_SCALE].contiguous().view(torch.float32)
        return blocks[:, _SCALE:].contiguous().view(dtype).float() * factors

    name = str(dtype).removeprefix("torch.")
    return _join(BlockType(name, count, _SCALE + count, expand), weight.contiguous().view(torch.uint8), scale, columns)


def pack_codes(
    codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, block: int, shape: tuple[int, ...], name: str
) -> Packed | None:
    """codes: two a byte into the table of 16 numbers, the first in the upper half. scale: of each block of numbers.

    None where a row is no whole number of blocks.
    """
    if len(shape) != 2 or shape[1] % block or block % 2:
        return None

    def expand(blocks: torch.Tensor) -> torch.Tensor:
        factors, stored = blocks[:, :_SCALE].contiguous().view(torch.float32), blocks[:, _SCALE:]
        numbers = torch.stack((stored >> 4, stored & 15), 2).flatten(1).int()
        return table.to(blocks.device)[numbers] * factors

    return _join(BlockType(name, block, _SCALE + block // 2, expand), codes, scale, shape[1])


def _join(kind: BlockType, stored: torch.Tensor, scale: torch.Tensor, columns: int) -> Packed:
    stored, scale = stored.reshape(-1, kind.size - _SCALE), scale.float().reshape(-1, 1).contiguous().view(torch.uint8)
    data = torch.cat((scale, stored), 1).flatten()
    return Packed(data, Packing(((kind, len(stored) * kind.count // columns),), columns))
