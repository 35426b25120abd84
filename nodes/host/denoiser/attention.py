"""The host's attention backends."""

import functools

from comfy.cli_args import args
from comfy.ldm.modules import attention as host_backends

from ....pixart.layers import LONG_SEQUENCE, gather_heads, split_heads


def host_attention(transformer_options):
    """The host's attention, in whatever backend it runs, as a function like `pixart.layers.attend`."""
    return functools.partial(_host_attend, transformer_options)


def _host_attend(transformer_options, q, k, v, num_heads, mask=None):
    attend, layout = _backend(q.device.type), {}
    if q.device.type == "cpu" and attend is host_backends.attention_pytorch and k.shape[1] >= LONG_SEQUENCE:
        q, k, v = (split_heads(t, num_heads) for t in (q, k, v))
        k, v, layout = gather_heads(k), gather_heads(v), {"skip_reshape": True}
    return attend(q, k, v, num_heads, mask=mask, transformer_options=transformer_options, **layout)


def _backend(device_type):
    """The host's choice of attention; on the CPU, where it looks at memory alone, PyTorch's unless asked otherwise."""
    chosen = host_backends.optimized_attention
    told = args.use_quad_cross_attention or args.force_upcast_attention
    if device_type == "cpu" and chosen is host_backends.attention_sub_quad and not told:
        return host_backends.attention_pytorch  # less than half the time on two cores, and no more memory
    return chosen
