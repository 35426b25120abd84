"""Linear layers of the blocks in 8 bits that are multiplied in 8 bits, by the host's own kernels.

Weights have a scale for each output channel, activations one for each token, which is measured as they come.
"""

import json
import re

import comfy.ops
import torch

from ....pixart.weights.quantised.packed import Packed

FORMAT = "int8_tensorwise"  # the host's name
_LAYER = re.compile(r"blocks\.\d+\.(attn\.(qkv|proj)|cross_attn\.(q_linear|kv_linear|proj)|mlp\.fc[12])\.weight")
_LARGEST = torch.iinfo(torch.int8).max
_SMALLEST_SCALE = 1e-12  # of a row of zeros


def require_kernels() -> None:
    """Raises ValueError for a host that cannot multiply in 8 bits."""
    if FORMAT not in getattr(comfy.ops, "QUANT_ALGOS", ()):
        raise ValueError(
            "No products in 8 bits here: got weight_dtype int8 in a ComfyUI without its int8 layers, expected a newer "
            "one with the package comfy-kitchen. Update ComfyUI, or choose bf16, fp16 or fp8."
        )


def quantise(key: str, tensor) -> dict[str, torch.Tensor]:
    """What stands for a weight of the blocks' linear layers in the host's int8 layout; {} for any other."""
    if _LAYER.fullmatch(key) is None:
        return {}
    weight = tensor.expand() if isinstance(tensor, Packed) else tensor.float()  # (out, in)
    scale = (weight.abs().amax(1, keepdim=True) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    mark = json.dumps({"format": FORMAT}).encode()
    stem = key.removesuffix("weight")
    return {
        key: (weight / scale).round_().to(torch.int8),
        f"{stem}weight_scale": scale,
        f"{stem}comfy_quant": torch.tensor(list(mark), dtype=torch.uint8),
    }
