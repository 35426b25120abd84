"""Self-attention that reads averages of neighbouring tokens: less time for large pictures. Approximate, with a dial."""

from dataclasses import dataclass

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


def compress_keys(inputs, index: int, depth: int, options: dict):
    """The BlockInputs for block `index`, or for a ControlNet's copy of it, under the options of this evaluation."""
    compression = options.get(KV_COMPRESSION)
    if compression is None or not compression.covers(index, depth):
        return inputs
    return inputs._replace(window=compression.factor)
