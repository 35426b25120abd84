"""One block compiled once, and used for all of them: what decides between blocks stays plain Python."""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..layers import Attention
from ..quoting import shorten
from ..transformer import MASK_ALIGNMENT, BlockInputs, PixArt, caption_bias

GRAPHS = 16  # of one kind of block at the most; of each three are used, see CompiledBlocks

logger = logging.getLogger(__name__)


class _Pass(NamedTuple):
    """What a compiled block needs of one forward pass beside its BlockInputs.

    bias: (B, 1, 1, L') contiguous, L' the caption's length rounded up.
    extent: (rows + 1, columns + 1, 0), the grid as a shape; without the 1 a single row would be a graph of its own.
    """

    bias: torch.Tensor
    extent: torch.Tensor


class CompiledBlocks:
    """Runs blocks by one compiled function: `model.compiled = CompiledBlocks()`, or `BlockInputs.run` by `enter`.

    settings: of torch.compile; a guard filter among its options is left out, since every guard counts here.
    Whatever sizes, batches and captions come, there are at most three graphs of one kind of block: of the first shapes
    as they are, then of any shapes, for one row and for several.
    Weights come in as tensors: other ones, such as a LoRA's, need no other graph.
    on_failure: called with an error of the compiler; afterwards blocks run uncompiled, and `trouble` is what it
    returned. None raises it.
    """

    def __init__(self, *, on_failure: Callable[[Exception], str] | None = None, **settings):
        self.dynamic = settings.get("dynamic")
        self.settings = settings | {"dynamic": None if self.dynamic else self.dynamic}
        if settings.get("options"):
            options = {name: value for name, value in settings["options"].items() if name != "guard_filter_fn"}
            self.settings["options"] = options or None
        self.on_failure, self.failed, self.trouble = on_failure, False, ""
        self._first: dict[tuple, tuple] = {}
        self._compiled: dict[tuple, Callable] = {}

    def enter(self, inputs: BlockInputs, x) -> BlockInputs:
        """The BlockInputs of a forward pass, whose blocks run compiled. x: (B, N, D), the tokens."""
        if self.failed:
            return inputs
        batch, length = x.shape[0], inputs.caption.shape[1]
        bias = inputs.caption_bias
        if bias is None:
            bias = caption_bias(torch.ones(batch, length, dtype=torch.bool, device=x.device), x.dtype)
        shared = _Pass(round_up(bias), x.new_empty(*(side + 1 for side in inputs.grid), 0))
        rows = inputs.rows
        if rows is not None and len(rows[0]) != batch:
            rows = torch.stack(rows).expand(-1, batch, -1, -1).contiguous().unbind()
        return inputs._replace(rows=rows, run=functools.partial(self.run, shared))

    def run(self, shared: _Pass, block, x, inputs: BlockInputs, keys_values=None, rows=None):
        """Block by the compiled function, (B, N, D) -> (B, N, D)."""
        if self.failed:
            return block(x, inputs, keys_values, rows)
        if rows is None:
            rows = block.modulation_rows(inputs.modulation)
        if len(rows) != len(x):
            rows = rows.expand(len(x), -1, -1).contiguous()
        if keys_values is None:
            keys_values = block.cross_attn.keys_values(inputs.caption)
        if keys_values.shape[1] < MASK_ALIGNMENT:  # a length of 1 would be a graph more
            keys_values = F.pad(keys_values, (0, 0, 0, MASK_ALIGNMENT - keys_values.shape[1]))
        kind = self._kind(block, x, inputs)
        self._mark(kind, x, rows, keys_values, shared)
        given = (x, rows, keys_values, shared.bias, shared.extent)
        try:
            return self._function(kind)(block, *given, inputs.self_attention, inputs.cross_attention, inputs.window)
        except torch._dynamo.exc.TorchDynamoException as error:
            if self.on_failure is None:
                raise
            self.failed, self.trouble = True, self.on_failure(error)
        return block(x, inputs._replace(run=None), keys_values[:, : inputs.caption.shape[1]], rows)

    def _kind(self, block, x, inputs):
        """What a graph of its own is needed for, whatever the shapes."""
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled(x.device.type))
        return (
            *(type(block), block.attn.compress, block.attn.qk_norm, type(block.attn.qkv), x.shape[2], x.dtype),
            *(x.device, getattr(block.attn.qkv, "base", block.attn.qkv).weight.dtype, inputs.window, *modes),
        )

    def _function(self, kind):
        if kind not in self._compiled:
            self._compiled[kind] = torch.compile(_compute, **self.settings, **_bounds())
        return self._compiled[kind]

    def _mark(self, kind, x, rows, keys_values, shared: _Pass):
        """Marks for the compiler what changes, from the second shapes on."""
        shapes = tuple(tensor.shape for tensor in (x, rows, keys_values, *shared))
        if self.dynamic is False or (not self.dynamic and self._first.setdefault(kind, shapes) == shapes):
            return
        changing = [(x, (0, 1)), (rows, (0,)), (keys_values, (0, 1)), (shared.bias, (0, 3)), (shared.extent, (0, 1))]
        for tensor, axes in changing:
            for axis in axes:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)


def _compute(
    block, x, rows, keys_values, bias, extent, self_attention: Attention, cross_attention: Attention, window: int
):
    """A block on tensors alone. The grid comes as a shape, since a number that changes would be a graph of its own."""
    bias, grid = bias[..., : keys_values.shape[1]], (extent.shape[0] - 1, extent.shape[1] - 1)
    inputs = BlockInputs(rows, x, bias, grid, self_attention, cross_attention, window=window)
    return block(x, inputs, keys_values, rows)


def round_up(bias):
    """(B, 1, 1, L) -> (B, 1, 1, L'), contiguous, L' a multiple of MASK_ALIGNMENT; what is added is hidden."""
    missing = -bias.shape[3] % MASK_ALIGNMENT
    return F.pad(bias, (0, missing), value=torch.finfo(bias.dtype).min) if missing else bias.contiguous()


@functools.cache
def _bounds() -> dict:
    """A cache of graphs of its own for each function, where PyTorch has that: others' would count among ours."""
    known = inspect.signature(torch.compile).parameters
    return {
        name: value for name, value in {"isolate_recompiles": True, "recompile_limit": GRAPHS}.items() if name in known
    }


@functools.cache
def try_compiler(device_type: str) -> str:
    """Compiles a sum on this kind of device: "" where that works, otherwise `explain_failure` of what it ends with."""
    try:
        torch.compile(_add_one, fullgraph=True)(torch.zeros(8, device=device_type))
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, OSError, ImportError) as error:
        return explain_failure(error)
    return ""


def _add_one(x):
    return x + 1


def explain_failure(error: Exception) -> str:
    """Says in the log, and returns, why blocks run uncompiled and what would help."""
    message = (
        f"PixArt runs uncompiled: got {shorten(str(error).strip(), 200)}, expected PyTorch's compiler to work. The "
        f"pictures are the same and take longer. For the CPU install a C++ compiler, for a GPU Triton."
    )
    logger.warning("%s", message)
    return message


def compile_blocks(model: PixArt, **settings) -> CompiledBlocks:
    """Lets a PixArt, and a ControlNet beside it, run its blocks compiled from now on. settings: see CompiledBlocks."""
    model.compiled = CompiledBlocks(**settings)
    return model.compiled
