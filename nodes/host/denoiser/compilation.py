"""PixArt under torch.compile: its blocks are compiled, and what decides between them is not."""

import functools
from typing import Any

from ....pixart.acceleration.compilation import CompiledBlocks

COMPILED = "pixart_compiled"  # transformer option: the CompiledBlocks of a MODEL
HOST_SETTINGS = "torch_compile_kwargs"  # model option: what the host's own node gives torch.compile
KEPT = 8  # settings whose compiled blocks are kept


def compiled_blocks(net, patcher, options: dict) -> CompiledBlocks | None:
    """What runs the blocks of this evaluation: of PixArt Compile, or of a node that has compiled the net as a whole.

    Compiled as a whole, a cache or an interval would decide once and for all, since the host lets PyTorch ignore what
    changes in its transformer options. None where nothing is compiled, or nobody says how.
    """
    if COMPILED in options:
        return options[COMPILED]
    settings = getattr(patcher, "model_options", {}).get(HOST_SETTINGS)
    return blocks_for(settings) if settings is not None and hasattr(net, "_orig_mod") else None


def blocks_for(settings: dict[str, Any]) -> CompiledBlocks:
    """The same CompiledBlocks for the same settings of torch.compile: another model, or a LoRA, finds its graphs."""
    options = settings.get("options") or {}
    options = {name: value for name, value in options.items() if name != "guard_filter_fn"}
    rest = {name: value for name, value in settings.items() if name != "options"}
    return _blocks_for(tuple(sorted(rest.items(), key=_name)), tuple(sorted(options.items(), key=_name)))


def _name(item):
    return item[0]


@functools.lru_cache(maxsize=KEPT)
def _blocks_for(settings, options):
    return CompiledBlocks(**dict(settings), options=dict(options) or None)
