import platform
from pathlib import Path

import pytest
import torch

from pixart_pack.pixart.acceleration import processors
from pixart_pack.pixart.acceleration.processors import has_bf16, own_dtype

CPU_INFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPU_INFO.is_file(), reason="reads Linux's list of an x86 CPU")
def test_the_cpu_is_known_by_its_own_flags():
    """An AVX-512 without bfloat16 imitates it, which PyTorch's own question for oneDNN does not tell apart."""
    flags = CPU_INFO.read_text().partition("flags")[2].partition("\n")[0].split()
    assert has_bf16() == ("avx512_bf16" in flags or "amx_tile" in flags)


@pytest.mark.parametrize(
    ("device", "file_dtype", "has", "expected"),
    [
        ("cuda", torch.float16, False, torch.bfloat16),
        ("cpu", torch.bfloat16, True, torch.bfloat16),
        ("cpu", torch.bfloat16, False, torch.float32),
        ("cpu", torch.float16, True, torch.float32),
    ],
)
def test_the_dtype_that_nobody_chose(monkeypatch, device, file_dtype, has, expected):
    monkeypatch.setattr(processors, "has_bf16", lambda: has)
    assert own_dtype(device, file_dtype) == expected
