"""How much memory something takes: the GPU's where there is one, else this process's (Linux)."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch


class PeakMemory:
    """The highest use of memory since `reset`: the GPU's where there is one, else this process's (Linux)."""

    def reset(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def read(self) -> int:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else read_status("VmHWM")


def measure_peak(run: Callable) -> int:
    """Bytes that run() needs at its peak beyond what is there before it."""
    gc.collect()
    if sys.platform == "linux":  # what earlier work left to the C library is not taken for what this finds there
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    memory = PeakMemory()
    memory.reset()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else memory.read()
    run()
    return max(memory.read() - before, 0)


def read_status(field: str) -> int:
    """Bytes of this process by the kernel's name for them, such as RssAnon (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024
