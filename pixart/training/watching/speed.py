"""How much memory a training takes, for logs."""

import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def describe_memory(device: torch.device) -> dict[str, float]:
    """{"memory_gb"}: the most that was taken so far, of a GPU by tensors, elsewhere by the process; {} if unknown."""
    if device.type == "cuda":
        return {"memory_gb": round(torch.cuda.max_memory_allocated(device) / 2**30, 3)}
    if resource is None:
        return {}
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in bytes
    return {"memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)}
