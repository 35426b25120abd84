"""What a backward pass computes again rather than to keep it: whole blocks, or what is cheap in them."""

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ..layers import modulate
from ..transformer import PixArtBlock
from .adapters import Casts, casts_of


def recompute_block(block: nn.Module) -> None:
    """Let a block keep its input alone, and run once more in the backward pass: a third more time."""
    block.forward = partial(_checkpointed, block.forward, casts_of(block))


def _checkpointed(forward: Callable, casts: Casts | None, *args):
    if casts is None:
        return checkpoint(forward, *args, use_reentrant=False)

    held = casts.held

    def run(*args):
        with casts.holding(held):  # the factors of this pass, when it is over as well
            return forward(*args)

    return checkpoint(run, *args, use_reentrant=False)


def recompute_cheap(block: nn.Module) -> None:
    """Let the PixArtBlocks in a module keep 9 of 14 numbers of each token and channel, with the same gradients.

    What the norms' modulation gives and what the feed-forward layer's first product gives are computed again: two
    norms and a seventh of the forward pass's products.
    """
    for module in block.modules():
        if isinstance(module, PixArtBlock):
            recipes = _Recipes(module)
            module.modulate = recipes.modulate
            module.attn.qkv.forward = partial(recipes.run, module.attn.qkv.forward)
            module.mlp.forward = partial(recipes.run, module.mlp.forward)
            module.mlp.fc1.register_forward_hook(recipes.note_hidden)


class _Recipes:
    """How to make what a block's modules would keep for the backward pass.

    They are known by their memory.
    """

    def __init__(self, block: PixArtBlock):
        self.fc1, self.casts = block.mlp.fc1, casts_of(block)
        self.known: dict[StorageWeakRef, Callable[[], Tensor]] = {}

    def modulate(self, x, shift, scale):
        """As `layers.modulate`."""
        out = modulate(x, shift, scale)
        given = [tensor.detach() for tensor in (x, shift, scale)]
        self.known = {_place(out): lambda: modulate(*given)}
        return out

    def note_hidden(self, fc1, args, out):
        """After the first layer of the feed-forward part: out is what GELU keeps. (..., hidden)"""
        made = self.known.get(_place(args[0]))
        if made is not None:
            forward, held = fc1.forward, None if self.casts is None else self.casts.held
            self.known[_place(out)] = partial(_run_again, forward, made, self.casts, held, _precision(out))

    def run(self, forward: Callable, x: Tensor) -> Tensor:
        """A module's forward pass, which keeps recipes in place of what they make."""
        with saved_tensors_hooks(self._pack, _unpack):
            out = forward(x)
        self.known = {}
        return out

    def _pack(self, tensor: Tensor):
        made = self.known.get(_place(tensor)) if tensor.is_contiguous() else None
        return tensor.detach() if made is None else (made, tensor.shape)


def _place(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _unpack(kept):
    if isinstance(kept, Tensor):
        return kept
    made, shape = kept
    with torch.no_grad():
        return made().view(shape)


def _precision(like: Tensor) -> Callable:
    """The surroundings' autocast, as a function that gives it again."""
    kind = like.device.type
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext
    enabled = torch.is_autocast_enabled(kind)
    return partial(torch.autocast, kind, torch.get_autocast_dtype(kind), enabled=enabled, cache_enabled=False)


def _run_again(forward, made, casts, held, precision):
    with precision():
        if casts is None:
            return forward(made())
        with casts.holding(held):
            return forward(made())
