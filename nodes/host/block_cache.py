"""Reuses what most blocks did at an earlier step, while the first ones change little. Approximate, with a dial."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

BLOCK_CACHE = "pixart_block_cache"  # transformer option: the BlockCache of the run
_TINY = 1e-12


@dataclass
class _Memory:
    """Of one prompt, at the last evaluation in which all blocks ran.

    probe: (B, N, D), what the blocks before the cached ones added. added: (B, N, D), what the cached blocks added.
    """

    probe: torch.Tensor
    added: torch.Tensor


@dataclass
class BlockCache:
    """The state of one sampling run.

    threshold: largest relative change of what the first blocks add at which the rest is reused.
    first_block, last_block: the blocks that may be skipped, [first, last). active: whether the sigma (a float tensor)
    is one to skip at. most_reuses: how often in a row.
    """

    threshold: float
    first_block: int
    last_block: int
    active: Callable[[torch.Tensor], bool]
    most_reuses: int
    memories: dict[tuple, _Memory] = field(default_factory=dict)
    reused: dict[tuple, int] = field(default_factory=dict)
    evaluations: int = 0
    skipped: int = 0

    def begin(self, options: dict, residuals, tokens, depth: int) -> "Evaluation | None":
        """One forward pass; None when it is not to be touched. tokens: (B, N, D) before the first block."""
        prompts = options.get("uuids")
        first, last = self.first_block, min(self.last_block, depth)
        if not prompts or first >= last or tokens.shape[0] % len(prompts):
            return None
        self.evaluations += 1
        situation = (
            _patched(options),
            _controlled(residuals),
            tuple(tokens.shape[1:]),
            tokens.shape[0] // len(prompts),
        )
        keys = [(prompt, *situation) for prompt in prompts]
        return Evaluation(self, keys, tokens, first, last, self.active(options.get("sigmas")))

    def clear(self) -> None:
        """Let go of all tensors."""
        self.memories.clear()
        self.reused.clear()

    def change(self, keys: list[tuple], probe) -> float:
        """The largest relative change of the probe among the prompts; infinite where one has not been seen."""
        if any(key not in self.memories or self.reused[key] >= self.most_reuses for key in keys):
            return float("inf")
        changes = []
        for key, now in zip(keys, probe.chunk(len(keys)), strict=True):
            before = self.memories[key].probe
            changes.append((now - before).abs().mean() / (before.abs().mean() + _TINY))
        return float(torch.stack(changes).max())


class Evaluation:
    """One forward pass through the blocks: tells which to skip, and remembers what those that ran added."""

    def __init__(self, cache: BlockCache, keys: list[tuple], tokens, first: int, last: int, may_skip: bool):
        self.cache, self.keys, self.first, self.last, self.may_skip = cache, keys, first, last, may_skip
        self.start, self.probe, self.entered, self.settled = tokens, None, None, False

    def before(self, index: int, tokens) -> tuple[int, Any]:
        """(the block to run next, its tokens), called in front of block `index`."""
        if index == self.last and not self.settled:
            self._store(tokens)
        if index != self.first or self.entered is not None:
            return index, tokens
        self.probe, self.entered, cache = tokens - self.start, tokens, self.cache
        self.start = None
        if self.may_skip and cache.change(self.keys, self.probe) < cache.threshold:
            cache.skipped += 1
            for key in self.keys:
                cache.reused[key] += 1
            self.settled = True
            return self.last, tokens + torch.cat([cache.memories[key].added for key in self.keys])
        return index, tokens

    def end(self, tokens) -> None:
        """Called behind the last block."""
        if not self.settled:
            self._store(tokens)

    def _store(self, tokens) -> None:
        count = len(self.keys)
        added = (tokens - self.entered).chunk(count)
        for key, probe, delta in zip(self.keys, self.probe.chunk(count), added, strict=True):
            self.cache.memories[key] = _Memory(probe, delta)
            self.cache.reused[key] = 0
        self.settled = True


def _patched(options: dict) -> tuple:
    """Which blocks are replaced: a run that skips layers for its guidance has memories of its own."""
    replaced = options.get("patches_replace", {})
    return tuple(frozenset(replaced.get(kind, ())) for kind in ("dit", "attn1"))


def _controlled(residuals) -> tuple:
    """Which blocks a ControlNet steers: when one begins or ends, nothing from before is reused."""
    return tuple(residual is not None for residual in residuals or ())
