"""The host's attention backends."""

import contextlib
import functools
from contextvars import ContextVar

import torch
from comfy.cli_args import args
from comfy.ldm.modules import attention as host_backends

from ....pixart.layers import LONG_SEQUENCE, gather_heads, split_heads

OVERRIDE = "optimized_attention_override"  # transformer option: a patch of the host for all attentions of a model
_overridden: ContextVar[dict] = ContextVar("overridden")


@contextlib.contextmanager
def block_attention(transformer_options, compiled):
    """The host's attention, in whatever backend it runs, as a function like `pixart.layers.attend`.

    compiled: of blocks that are compiled. Then it is the same function in every evaluation, and a patch that overrides
    the attention of a model runs uncompiled between what is compiled.
    """
    if not compiled:
        yield functools.partial(_host_attend, transformer_options)
    elif OVERRIDE not in transformer_options:
        yield _attend_traced
    else:
        token = _overridden.set(transformer_options)
        try:
            yield _attend_overridden
        finally:
            _overridden.reset(token)


def _attend_traced(q, k, v, num_heads, mask=None):
    return _host_attend({}, q, k, v, num_heads, mask)


@torch.compiler.disable
def _attend_overridden(q, k, v, num_heads, mask=None):
    return _host_attend(_overridden.get(), q, k, v, num_heads, mask)


def _host_attend(transformer_options, q, k, v, num_heads, mask=None):
    attend, layout = _backend(q.device.type), {}
    if q.device.type == "cpu" and attend is host_backends.attention_pytorch and k.shape[1] >= LONG_SEQUENCE:
        q, k, v = (split_heads(t, num_heads) for t in (q, k, v))
        k, v, layout = gather_heads(k), gather_heads(v), {"skip_reshape": True}
    return attend(q, k, v, num_heads, mask=mask, transformer_options=transformer_options, **layout)


def _backend(device_type):
    """The host's choice of attention; on the CPU, where it looks at memory alone, PyTorch's unless asked otherwise."""
    chosen = host_backends.optimized_attention
    chosen_by_user = args.use_quad_cross_attention or args.force_upcast_attention
    if device_type == "cpu" and chosen is host_backends.attention_sub_quad and not chosen_by_user:
        return host_backends.attention_pytorch  # less than half the time on two cores, and no more memory
    return chosen
