"""How far two computations of the same values may lie apart: by their rounding, and no further.

Equal bit by bit are only the same kernels over the same shapes in the same memory layout. Another batch, another
implementation, a view, or weights that lie in a mapped file may each be given to another kernel, which sums in another
order; and which kernel takes what differs from processor to processor.
"""

import torch


def assert_equal_to_rounding(found: torch.Tensor, expected: torch.Tensor, units: float) -> None:
    """found is expected but for `units` of the number format's eps times the greatest magnitude of expected."""
    bound = units * torch.finfo(expected.dtype).eps * expected.detach().abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)
