"""ComfyUI in the benchmarks' process."""

import importlib

import torch


def import_host():
    """Import `comfy`, on the CPU where there is no GPU. Raises RuntimeError when it cannot be imported."""
    try:
        options = importlib.import_module("comfy.cli_args").args
    except ImportError as error:
        raise RuntimeError(
            f"ComfyUI is not importable: got {error}, expected it on the Python path. Run `python dev.py bench`."
        ) from error
    options.cpu = options.cpu or not torch.cuda.is_available()  # before model_management, which asks for a GPU
    return importlib.import_module("comfy")
