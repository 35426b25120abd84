"""What the stored numbers of a quantised weight mean: one function for each way to keep them.

Each gives float32 numbers; or blocks, where the layer's weight may stay packed and has a form for that.
"""

import math

import torch

from ...quoting import shorten
from .layers import Layer, misfit, read_description
from .packed import Packed
from .rows import pack_codes, pack_scaled

_INT8_LEVELS = 127.0
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_MOST_BLOCK = 2**16


def by_rows_of_127(layer: Layer) -> torch.Tensor | Packed:
    """bitsandbytes' 8 bit: the largest of each row lies beside it. (out, in) float32."""
    weight, largest = layer.take("weight"), layer.take("SCB")
    layer.take_any("weight_format")
    _require_type(layer, weight, (torch.int8,))
    return _scaled_whole(layer, weight, largest.float() / _INT8_LEVELS)


def by_code_table(layer: Layer) -> torch.Tensor | Packed:
    """bitsandbytes' 4 bit: two codes a byte into a table of 16 numbers, and a largest for each block. float32."""
    state = _read_json(layer, layer.take(f"weight.quant_state.bitsandbytes__{layer.kind}"))
    shape, block = _counts(layer, state.get("shape")), _counts(layer, [state.get("blocksize")])[0]
    packed = layer.take("weight").contiguous().flatten().view(torch.uint8)
    table, largest = layer.take("weight.quant_map").float(), layer.take("weight.absmax")
    nested, nested_table = layer.take_any("weight.nested_absmax"), layer.take_any("weight.nested_quant_map")
    if largest.dtype == torch.uint8:
        if nested is None or nested_table is None or nested_table.numel() != 256:
            raise misfit(layer, "block scales without their own", "weight.nested_absmax and weight.nested_quant_map")
        per = _counts(layer, [state.get("nested_blocksize")])[0]
        steps = _repeat(layer, nested.float(), per, largest.numel())
        offset = state.get("nested_offset", 0.0)
        if type(offset) not in (int, float) or not math.isfinite(offset):
            raise misfit(layer, f"the offset {shorten(offset)}", "a number")
        largest = nested_table.float()[largest.long()] * steps + offset
    count = math.prod(shape)
    if table.numel() != 16 or packed.numel() != (count + 1) // 2:
        raise misfit(layer, f"{packed.numel()} bytes and {table.numel()} codes", f"those of {shape}")
    if layer.keep_packed and largest.numel() * block == count:
        found = pack_codes(packed, largest, table, block, tuple(shape), layer.kind)
        if found is not None:
            return found
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[:count]
    return (table[codes.long()] * _repeat(layer, largest.float(), block, count)).reshape(shape)


def by_scale(layer: Layer) -> torch.Tensor | Packed:
    """compressed-tensors, modelopt, fbgemm, ComfyUI: (weight - zero point) times the scale of all, a row or a block."""
    names = {"scale_weight": ("scale_weight", "scale_input")}.get(layer.kind, ("weight_scale", "input_scale"))
    weight, scale = layer.take("weight"), layer.take(names[0])
    layer.take_any(names[1])
    for name in ("input_scale_ub", "input_zero_point", "output_scale", "weight_g_idx", "comfy_quant"):
        layer.take_any(name)
    zero = layer.take_any("weight_zero_point")
    _require_type(layer, weight, (torch.int8, *_FP8))
    if zero is None:
        return _scaled_whole(layer, weight, scale.float())
    values = weight.float()
    return scaled(layer, values - _spread(layer, zero.float(), tuple(values.shape)), scale.float())


def by_inverse_scale(layer: Layer) -> torch.Tensor | Packed:
    """Fine-grained fp8: every block (128 x 128 where config.json says nothing else) times its `weight_scale_inv`."""
    weight, scale = layer.take("weight"), layer.take("weight_scale_inv").float()
    layer.take_any("activation_scale")
    _require_type(layer, weight, _FP8)
    block = _counts(layer, layer.settings.get("weight_block_size") or [128, 128])
    if weight.ndim != 2 or scale.numel() == 1:
        return _scaled_whole(layer, weight, scale)
    rows, columns = weight.shape
    if len(block) != 2 or tuple(scale.shape) != (-(-rows // block[0]), -(-columns // block[1])):
        raise misfit(layer, f"scales of {tuple(scale.shape)} for {tuple(weight.shape)}", f"blocks of {tuple(block)}")
    by_row = scale.repeat_interleave(block[0], 0)[:rows]
    if not columns % block[1]:
        return _scaled_whole(layer, weight, by_row)
    return weight.float() * by_row.repeat_interleave(block[1], 1)[:, :columns]


def by_packed_integers(layer: Layer) -> torch.Tensor:
    """compressed-tensors' pack-quantized: 4 or 8 bits, as many as fit in an int32, the lowest first."""
    packed, scale = layer.take("weight_packed"), layer.take("weight_scale").float()
    shape = tuple(_counts(layer, layer.take("weight_shape").tolist()))
    zero, order = layer.take_any("weight_zero_point"), layer.take_any("weight_g_idx")
    if zero is not None or order is not None or packed.dtype != torch.int32 or len(shape) != 2 or packed.ndim != 2:
        raise misfit(layer, "packed integers with zero points or an order of their own", "symmetric ones")
    bits = next((bits for bits in (4, 8) if packed.shape == (shape[0], -(-shape[1] * bits // 32))), None)
    if bits is None:
        raise misfit(layer, f"packed integers of {tuple(packed.shape)}", f"4 or 8 bits for {shape}")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = ((packed[:, :, None] >> shifts) & (2**bits - 1)).flatten(1)[:, : shape[1]] - 2 ** (bits - 1)
    return scaled(layer, values.float(), scale)


def by_quanto(layer: Layer) -> torch.Tensor | Packed:
    """optimum-quanto: 8 bits by the scale of a row; 4 and 2 bits packed over halves or quarters of the groups."""
    scale, shift = layer.take("weight._scale").float(), layer.take_any("weight._shift")
    for name in ("input_scale", "output_scale"):
        layer.take_any(name)
    data = layer.take_any("weight._data")
    if data is not None:
        _require_type(layer, data, (torch.int8, *_FP8))
        if shift is None:
            return _scaled_whole(layer, data, scale)
        return scaled(layer, data.float() - shift.float(), scale)
    packed = layer.take("weight._data._data")
    if shift is None or packed.ndim < 2 or packed.dtype != torch.uint8 or not scale.numel() or not packed.numel():
        raise misfit(layer, "packed weights without their shift", "weight._shift")
    bits = next((bits for bits in (4, 2) if packed.shape[0] * (8 // bits) == scale.numel()), None)
    if bits is None or scale.numel() != shift.numel():
        raise misfit(layer, f"{packed.shape[0]} packed rows for {scale.numel()} scales", "2 or 4 rows in each")
    parts = [(packed.flatten(1) >> start) & (2**bits - 1) for start in range(0, 8, bits)]
    values, scale, shift = torch.cat(parts).float(), scale.reshape(-1, 1), shift.reshape(-1, 1)
    values = values * scale - shift if shift.is_floating_point() else (values - shift) * scale
    in_groups = packed.ndim == 2  # which a convolution's rows are not
    return values.reshape(layer.shape_of(values.numel()) if in_groups else (-1, *packed.shape[1:]))


def by_torchao(layer: Layer) -> torch.Tensor | Packed:
    """torchao's flattened 8 bit subclasses: (data - zero point) times the scale of its block."""
    said = layer.metadata.get(f"{layer.stem}.weight")
    kind = (read_description(said) or {}).get("_type") if said else None
    if kind not in ("Int8Tensor", "Float8Tensor"):
        raise misfit(layer, f"a torchao {shorten(kind)}", "an Int8Tensor or Float8Tensor")
    data, scale = layer.take("_weight_qdata"), layer.take("_weight_scale").float()
    zero = layer.take_any("_weight_zero_point")
    layer.take_any("_weight_act_pre_scale")
    _require_type(layer, data, (torch.int8, *_FP8))
    if zero is None:
        return _scaled_whole(layer, data, scale)
    return scaled(layer, data.float() - _spread(layer, zero.float(), tuple(data.shape)), scale)


def scaled(layer: Layer, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """values times a scale of all, a row, or a block that divides them evenly. Raises ValueError for others."""
    return values * _spread(layer, scale, tuple(values.shape))


def _scaled_whole(layer: Layer, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | Packed:
    """The stored numbers times their scale, or both in blocks."""
    found = pack_scaled(weight, scale) if layer.keep_packed and weight.ndim == 2 else None
    return scaled(layer, weight.float(), scale) if found is None else found


def _spread(layer: Layer, scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1 and len(shape) > 1 and scale.shape[0] == shape[0]:
        scale = scale.reshape(-1, *(1 for _ in shape[1:]))
    fits = scale.ndim == len(shape) and all(
        part and not size % part for part, size in zip(scale.shape, shape, strict=True)
    )
    if not fits:
        raise misfit(layer, f"scales of {tuple(scale.shape)}", f"one for all, a row or a block of {shape}")
    for dimension, size in enumerate(shape):
        if scale.shape[dimension] not in (1, size):
            scale = scale.repeat_interleave(size // scale.shape[dimension], dimension)
    return scale


def _repeat(layer: Layer, values: torch.Tensor, block: int, count: int) -> torch.Tensor:
    """Each value as often as its block is long, `count` in all."""
    if values.numel() != -(-count // block):
        raise misfit(layer, f"{values.numel()} blocks of {block}", f"those of {count} numbers")
    return values.flatten().repeat_interleave(block)[:count] if block < count else values.flatten().expand(count)


def _require_type(layer: Layer, weight: torch.Tensor, dtypes: tuple) -> None:
    if weight.dtype not in dtypes:
        raise misfit(layer, f"{weight.dtype} weights", " or ".join(str(dtype) for dtype in dtypes))


def _counts(layer: Layer, values: object) -> list[int]:
    """Sizes as a file gives them. Raises ValueError for what is none."""
    sound = isinstance(values, list) and 0 < len(values) <= 4
    if not sound or not all(type(value) is int and 0 < value < 2**31 for value in values):
        raise misfit(layer, f"the sizes {shorten(values)}", "positive integers")
    return values


def _read_json(layer: Layer, tensor: torch.Tensor) -> dict:
    content = read_description(tensor)
    if content is None:
        raise misfit(layer, "an unreadable description", "a JSON object")
    return content
