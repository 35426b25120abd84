"""Dropout that is told by the numbers of the forward pass, the picture and the layer alone.

So a run that is continued, shared out among processes, or computes its blocks twice drops what an unbroken run of one
process drops.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

_ROWS = 512  # masks are drawn for as many tokens at a time, so that a caption's does not depend on its padding


@dataclass(frozen=True)
class Chances:
    """What tells the dropout of one forward pass.

    name: of the training and the pass. positions: of the batch's pictures in the global batch.
    """

    name: str
    positions: Sequence[int]

    def drop(self, x: Tensor, share: float, layer: int) -> Tensor:
        """x with a share of its numbers at 0 and the others scaled up, the same each time.

        x: (B, tokens, C), each picture with a mask of its own; or (rows, C) of timesteps and sizes, which pictures
        may have in common, with one mask for all rows.
        """
        if x.ndim == 2:
            kept = self._draw(x, share, f"{layer}")[:1]
        else:
            kept = torch.stack([self._draw(x[0], share, f"{layer} {position}") for position in self.positions])
        return x * kept / (1 - share)

    def _draw(self, like: Tensor, share: float, name: str) -> Tensor:
        """(rows, C) bool, True with probability 1 - share."""
        rows, channels = like.shape
        seed = Random(f"{self.name} {name}").getrandbits(63)  # of a text: its hash does not depend on the process
        generator = torch.Generator(like.device).manual_seed(seed)
        drawn = torch.rand(-(-rows // _ROWS) * _ROWS, channels, generator=generator, device=like.device)
        return drawn[:rows] >= share
