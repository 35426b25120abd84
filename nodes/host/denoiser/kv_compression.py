"""Self-attention that reads averages of neighbouring tokens: less time for large pictures. Approximate, with a dial."""

import functools
from dataclasses import dataclass

from ....pixart.layers import average_windows

KV_COMPRESSION = "pixart_kv_compression"  # transformer option: the KVCompression of this evaluation
ALL, EVERY_OTHER, LATER_HALF = BLOCKS = ("all", "every other", "later half")


@dataclass(frozen=True)
class KVCompression:
    """factor: side of the windows of tokens whose keys and values are averaged. blocks: of BLOCKS."""

    factor: int
    blocks: str

    def covers(self, index: int, depth: int) -> bool:
        """Whether block `index` of `depth` is one to compress. The first block is the most exact of every other."""
        if self.blocks == EVERY_OTHER:
            return index % 2 == 1
        return self.blocks == ALL or index >= depth // 2

    def attend(self, attention, grid, q, k, v, num_heads, mask=None):
        """Like `layers.attend`, by another attention. Keys that the model itself compresses are left alone."""
        if k.shape[1] == q.shape[1]:
            k, v = average_windows(k, grid, self.factor), average_windows(v, grid, self.factor)
        return attention(q, k, v, num_heads, mask=mask)


def compress_keys(inputs, index: int, depth: int, options: dict):
    """The BlockInputs for block `index`, or for a ControlNet's copy of it, under the options of this evaluation."""
    compression = options.get(KV_COMPRESSION)
    if compression is None or not compression.covers(index, depth):
        return inputs
    return inputs._replace(self_attention=functools.partial(compression.attend, inputs.self_attention, inputs.grid))
