"""ComfyUI in the benchmarks' process."""

import importlib

import torch


def import_host(device: str | None = None):
    """Import `comfy`. Raises RuntimeError when it cannot be imported.

    device: "cpu" or "cuda", counts the first time; None is the GPU where there is one.
    """
    try:
        options = importlib.import_module("comfy.cli_args").args
    except ImportError as error:
        raise RuntimeError(
            f"ComfyUI is not importable: got {error}, expected it on the Python path. Run `python dev.py bench`."
        ) from error
    on_cpu = not torch.cuda.is_available() if device is None else device == "cpu"
    options.cpu = options.cpu or on_cpu  # before model_management, which asks for a GPU
    return importlib.import_module("comfy")
