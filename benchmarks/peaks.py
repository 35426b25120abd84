"""How much memory something takes: a GPU's, or this process's (Linux)."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


class PeakMemory:
    """The highest use of memory since `reset`: the GPU's for "cuda", else this process's. 0 where it is not told."""

    def __init__(self, device: str = "cpu"):
        self.on_gpu = device == "cuda"

    def reset(self):
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif _PROCESS.is_dir():
            (_PROCESS / "clear_refs").write_text("5", encoding="ascii")

    def read(self) -> int:
        return torch.cuda.max_memory_allocated() if self.on_gpu else read_status("VmHWM")


def measure_peak(run: Callable, device: str = "cpu") -> int:
    """Bytes that run() needs at its peak beyond what is there before it. 0 where that is not told."""
    gc.collect()
    if sys.platform == "linux":  # what earlier work left to the C library is not taken for what this finds there
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    memory = PeakMemory(device)
    memory.reset()
    before = torch.cuda.memory_allocated() if memory.on_gpu else memory.read()
    run()
    return max(memory.read() - before, 0)


def read_status(field: str) -> int:
    """Bytes of this process by the kernel's name for them, such as RssAnon. 0 where there is no such kernel."""
    if not _PROCESS.is_dir():
        return 0
    status = (_PROCESS / "status").read_text(encoding="ascii")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024
