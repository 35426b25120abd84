"""Reuses what most blocks did at an earlier step, while the first ones change little. Approximate, with a dial."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

BLOCK_CACHE = "pixart_block_cache"  # transformer option: the BlockCache of the run
LONGEST_LINE = 3.0  # of the distances between the last two whole evaluations; measured, more costs accuracy
_TINY = 1e-12


@dataclass
class _Memory:
    """Of one prompt, at the last evaluation in which all blocks ran, and on which line that lies.

    probe: (B, N, D), what the blocks before the cached ones added. added: (B, N, D), what the cached blocks added.
    probe_step, added_step: by how much each differed from the whole evaluation before; None at the first.
    trust: (B, 1, 1) in [0, 1], how much of the step the line foretold when it was last checked; None before that.
    reused: how often in a row.
    """

    probe: torch.Tensor
    added: torch.Tensor
    probe_step: torch.Tensor | None = None
    added_step: torch.Tensor | None = None
    trust: torch.Tensor | None = None
    reused: int = 0

    def change(self, probe) -> torch.Tensor:
        """The relative change of the probe since, a scalar."""
        return (probe - self.probe).abs().mean() / (self.probe.abs().mean() + _TINY)

    def predict(self, probe) -> torch.Tensor:
        """What the cached blocks would add now, (B, N, D): along the line as far as the probe has moved along its own.

        By the probe in place of the time, solvers may evaluate in any order, twice at a time, and with fresh noise.
        """
        if self.trust is None:
            return self.added
        return torch.addcmul(self.added, (self.trust * self._distance(probe)).to(self.added), self.added_step)

    def follow(self, probe, added) -> "_Memory":
        """The memory of a whole evaluation that came after this one."""
        trust = None
        if self.added_step is not None:
            line = self._distance(probe) * self.added_step
            trust = _share(added - self.added, line).clamp(0.0, 1.0)
        return _Memory(probe, added, probe - self.probe, added - self.added, trust)

    def _distance(self, probe):
        return _share(probe - self.probe, self.probe_step).clamp(0.0, LONGEST_LINE)


def _share(x, direction):
    """How much of `direction` is in x: (B, N, D) twice -> (B, 1, 1), in float32, since squares leave half precision."""
    x, direction = x.float(), direction.float()
    return (x * direction).sum((1, 2), keepdim=True) / (direction.square().sum((1, 2), keepdim=True) + _TINY)


@dataclass
class BlockCache:
    """The state of one sampling run.

    threshold: largest relative change of what the first blocks add at which the rest is reused.
    first_block, last_block: the blocks that may be skipped, [first, last), and with a ControlNet those up to its last
    copy, since each reads the one before. active: whether the sigma (a float tensor) is one to skip at. most_reuses:
    how often in a row.
    """

    threshold: float
    first_block: int
    last_block: int
    active: Callable[[torch.Tensor], bool]
    most_reuses: int
    memories: dict[tuple, _Memory] = field(default_factory=dict)
    evaluations: int = 0
    skipped: int = 0

    def begin(self, options: dict, residuals, tokens, depth: int) -> "Evaluation | None":
        """One forward pass; None when it is not to be touched. tokens: (B, N, D) before the first block."""
        prompts = options.get("uuids")
        first, last = self.first_block, min(max(self.last_block, 1 + len(_controlled(residuals))), depth)
        if not prompts or first >= last or tokens.shape[0] % len(prompts):
            return None
        self.evaluations += 1
        situation = (
            patched_blocks(options),
            _controlled(residuals),
            tuple(tokens.shape[1:]),
            tokens.shape[0] // len(prompts),
        )
        keys = [(prompt, *situation) for prompt in prompts]
        return Evaluation(self, keys, tokens, first, last, options.get("sigmas"))

    def clear(self) -> None:
        """Let go of all tensors."""
        self.memories.clear()

    def recall(self, keys: list[tuple], probe, sigma) -> torch.Tensor | None:
        """What the cached blocks would add now, (B, N, D); None where too much has changed for one of the prompts.

        What waits for the device comes last: the sigma's number, then the change.
        """
        known = [self.memories.get(key) for key in keys]
        if any(memory is None or memory.reused >= self.most_reuses for memory in known) or not self.active(sigma):
            return None
        pairs = list(zip(known, probe.chunk(len(keys)), strict=True))
        if not torch.stack([memory.change(now) for memory, now in pairs]).max() < self.threshold:
            return None
        self.skipped += 1
        for memory in known:
            memory.reused += 1
        return torch.cat([memory.predict(now) for memory, now in pairs])

    def remember(self, keys: list[tuple], probe, added) -> None:
        """Notes a whole evaluation. probe, added: (B, N, D), the prompts one after another."""
        count = len(keys)
        for key, now, delta in zip(keys, probe.chunk(count), added.chunk(count), strict=True):
            before = self.memories.get(key)
            self.memories[key] = _Memory(now, delta) if before is None else before.follow(now, delta)


class Evaluation:
    """One forward pass through the blocks: decides which to skip, and remembers what those that ran added."""

    def __init__(self, cache: BlockCache, keys: list[tuple], tokens, first: int, last: int, sigma):
        self.cache, self.keys, self.first, self.last, self.sigma = cache, keys, first, last, sigma
        self.start, self.probe, self.entered, self.settled = tokens, None, None, False

    def before(self, index: int, tokens) -> tuple[int, Any]:
        """(the block to run next, its tokens), called in front of block `index`."""
        if index == self.last and not self.settled:
            self._store(tokens)
        if index != self.first or self.entered is not None:
            return index, tokens
        self.probe, self.entered = tokens - self.start, tokens
        self.start = None
        recalled = self.cache.recall(self.keys, self.probe, self.sigma)
        if recalled is None:
            return index, tokens
        self.settled = True
        return self.last, tokens + recalled

    def end(self, tokens) -> None:
        """Called behind the last block."""
        if not self.settled:
            self._store(tokens)

    def _store(self, tokens) -> None:
        self.cache.remember(self.keys, self.probe, tokens - self.entered)
        self.settled = True


def patched_blocks(options: dict) -> tuple:
    """Which blocks are replaced: a run that skips layers for its guidance has memories of its own."""
    replaced = options.get("patches_replace", {})
    return tuple(frozenset(replaced.get(kind, ())) for kind in ("dit", "attn1", "attn2"))


def _controlled(residuals) -> tuple:
    """Whether a ControlNet steers each block after the first, up to the last that it does.

    When one begins or ends, nothing from before is reused.
    """
    steered = [index for index, residual in enumerate(residuals or ()) if residual is not None]
    return tuple(index in steered for index in range(max(steered, default=-1) + 1))
