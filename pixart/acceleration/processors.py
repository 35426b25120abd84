"""What this machine's processor is quick at."""

import functools
import platform

import torch


@functools.cache
def has_bf16() -> bool:
    """Whether the CPU itself multiplies matrices in bfloat16 (AVX512_BF16, AMX, Arm's BF16), as PyTorch says.

    Others compute in bfloat16 too, and are slower at it than in float32.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        # PyTorch's operator below answers for every AVX-512, where oneDNN only imitates bfloat16.
        asked = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        return any(ask is not None and ask() for ask in asked)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def own_dtype(device_type: str, file_dtype: torch.dtype) -> torch.dtype:
    """What a model is best computed in where nobody says it.

    bfloat16 on a GPU. On a CPU float32, or bfloat16 where the file's weights are that and the CPU has it: rounding a
    file of more digits is for its owner to choose.
    """
    if device_type != "cpu" or (file_dtype == torch.bfloat16 and has_bf16()):
        return torch.bfloat16
    return torch.float32
