"""PixArt under torch.compile: its blocks are compiled, and what decides between them is not."""

import functools
from collections.abc import Callable
from typing import Any

import comfy.patcher_extension

from ....pixart.acceleration.compilation import CompiledBlocks, explain_failure, try_compiler
from ..text.captions import pixart_config

OUTER_SAMPLE = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
COMPILED = "pixart_compiled"  # transformer option: the CompiledBlocks of a MODEL
HOST_SETTINGS = "torch_compile_kwargs"  # model option: what the host's own node gives torch.compile
KEPT = 8  # settings whose compiled blocks are kept
DEFAULT, TUNED, GRAPHS = MODES = ("default", "tuned", "CUDA graphs")
TORCH_MODES = {DEFAULT: None, TUNED: "max-autotune-no-cudagraphs", GRAPHS: "reduce-overhead"}
LEARN, ANY, EACH = SIZES = ("learn what changes", "any size at once", "each size for itself")
DYNAMIC = {LEARN: None, ANY: True, EACH: False}


def compile_model(
    model, mode: str = DEFAULT, sizes: str = LEARN, say: Callable[[str], None] | None = None
) -> tuple[Any, str]:
    """A clone of the MODEL whose blocks run compiled, and "": or the MODEL, and why its blocks cannot be compiled.

    mode: of MODES. sizes: of SIZES. Weights that the host moves in during a step stay where they are for this clone, as
    with its own node. Where a block turns out not to be one for the compiler, it runs uncompiled: the log says so, and
    say is called with it at the end of every such picture.
    Raises ValueError for another model.
    """
    pixart_config(model)
    trouble = try_compiler(model.load_device.type)
    if trouble:
        return model, trouble
    dynamic = getattr(model, "is_dynamic", None)
    patched = model.clone(**({"disable_dynamic": True} if dynamic is not None and dynamic() else {}))
    blocks = blocks_for({"mode": TORCH_MODES[mode], "dynamic": DYNAMIC[sizes], "on_failure": explain_failure})
    patched.model_options["transformer_options"][COMPILED] = blocks
    patched.remove_wrappers_with_key(OUTER_SAMPLE, COMPILED)
    if say is not None:
        patched.add_wrapper_with_key(OUTER_SAMPLE, COMPILED, functools.partial(_sample_and_tell, blocks, say))
    return patched, ""


def _sample_and_tell(blocks: CompiledBlocks, say, executor, *args, **kwargs):
    try:
        return executor(*args, **kwargs)
    finally:
        if blocks.trouble:
            say(blocks.trouble)


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
    key = tuple(sorted(rest.items(), key=_name)), tuple(sorted(options.items(), key=_name))
    blocks = _blocks_for(*key)
    if not blocks.failed:
        return blocks
    _blocks_for.cache_clear()  # another model, or another day, may have more luck
    return _blocks_for(*key)


def _name(item):
    return item[0]


@functools.lru_cache(maxsize=KEPT)
def _blocks_for(settings, options):
    return CompiledBlocks(**dict(settings), options=dict(options) or None)
