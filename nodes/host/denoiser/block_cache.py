"""Reuses what most blocks did at an earlier step, while the first ones change little. Approximate, with a dial."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

BLOCK_CACHE = "pixart_block_cache"  # transformer option: the BlockCache of the run
FIRST_BLOCKS, FORECAST, INPUT = MODES = ("first blocks", "first blocks, forecast", "input, forecast")
LONGEST_LINE = 3.0  # of the distances between the last two whole evaluations; measured, more costs accuracy
LONGEST_FORECAST = 4.0  # the same in noise levels, where evaluations are spaced more evenly
SAME_LEVEL = 1e-4  # of the logarithm of a noise level
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

    def note(self, probe) -> None:
        """The cached blocks have been skipped."""
        self.reused += 1

    def predict(self, probe, place=0.0) -> torch.Tensor:
        """What the cached blocks would add now, (B, N, D): along the line as far as the probe has moved along its own.

        By the probe in place of the time, solvers may evaluate in any order, twice at a time, and with fresh noise.
        """
        if self.trust is None:
            return self.added
        return torch.addcmul(self.added, (self.trust * self._distance(probe)).to(self.added), self.added_step)

    def follow(self, probe, added, place=0.0) -> "_Memory":
        """The memory of a whole evaluation that came after this one."""
        trust = None
        if self.added_step is not None:
            line = self._distance(probe) * self.added_step
            trust = _share(added - self.added, line).clamp(0.0, 1.0)
        return _Memory(probe, added, probe - self.probe, added - self.added, trust)

    def _distance(self, probe):
        return _share(probe - self.probe, self.probe_step).clamp(0.0, LONGEST_LINE)


@dataclass
class _Forecast(_Memory):
    """One whose line goes on with the noise level.

    place: the logarithm of the noise level of the last whole evaluation; stride: how far from the one before.
    A line is followed before it was checked: noise levels go one way.
    Source: TaylorSeer, arXiv 2503.06923, of first order, which on PixArt is better than any other.
    """

    place: float = 0.0
    stride: float = 0.0

    def predict(self, probe, place=0.0) -> torch.Tensor:
        if self.added_step is None:
            return self.added
        distance = self._passed(place)
        if self.trust is None:
            return torch.add(self.added, self.added_step, alpha=distance)
        return torch.addcmul(self.added, (self.trust * distance).to(self.added), self.added_step)

    def follow(self, probe, added, place=0.0) -> "_Forecast":
        if abs(place - self.place) < SAME_LEVEL:  # evaluated again, as Heun's solver does: the line stays
            return type(self)(probe, added, None, self.added_step, self.trust, place=place, stride=self.stride)
        trust = None
        if self.added_step is not None:
            line = self._passed(place) * self.added_step
            trust = _share(added - self.added, line).clamp(0.0, 1.0)
        return type(self)(probe, added, None, added - self.added, trust, place=place, stride=place - self.place)

    def _passed(self, place):
        return min(max((place - self.place) / self.stride, 0.0), LONGEST_FORECAST)


@dataclass
class _InputForecast(_Forecast):
    """One that sums up the changes of a probe from evaluation to evaluation. drift: since the last whole one, a scalar.

    Source: TeaCache, arXiv 2411.19108.
    """

    drift: torch.Tensor | float = 0.0

    def change(self, probe) -> torch.Tensor:
        return self.drift + super().change(probe)

    def note(self, probe) -> None:
        self.drift, self.probe = self.change(probe), probe
        super().note(probe)


MEMORIES = {FIRST_BLOCKS: _Memory, FORECAST: _Forecast, INPUT: _InputForecast}


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
    how often in a row. mode: of MODES; INPUT looks at what the first block reads, runs no block to decide, and skips
    from block 0 on.
    """

    threshold: float
    first_block: int
    last_block: int
    active: Callable[[torch.Tensor], bool]
    most_reuses: int
    mode: str = FIRST_BLOCKS
    turn: Counter | None = None
    memories: dict[tuple, _Memory] = field(default_factory=dict)
    evaluations: int = 0
    skipped: int = 0

    def next_turn(self) -> None:
        """The host begins to evaluate all prompts. A prompt that comes twice until the next turn is of two tiles."""
        self.turn = Counter()

    def begin(self, options: dict, residuals, tokens, depth: int, read_input=None) -> "Evaluation | None":
        """One forward pass; None when it is not to be touched. tokens: (B, N, D) before the first block.

        read_input: a function that gives what the first block's attention reads, (B, N, D).
        """
        prompts = options.get("uuids")
        first, last = (
            0 if self.mode == INPUT else self.first_block,
            min(max(self.last_block, 1 + len(_controlled(residuals))), depth),
        )
        if not prompts or first >= last or tokens.shape[0] % len(prompts):
            return None
        self.evaluations += 1
        situation = (
            patched_blocks(options),
            _controlled(residuals),
            tuple(tokens.shape[1:]),
            tokens.shape[0] // len(prompts),
            (tokens.device, tokens.dtype),
            window_of(options),
        )
        keys = self._number([(prompt, *situation) for prompt in prompts])
        probe = read_input() if self.mode == INPUT else None
        return Evaluation(self, keys, tokens, first, last, options.get("sigmas"), probe)

    def _number(self, keys):
        """The keys, each with how often it came in this turn."""
        if self.turn is None:
            return keys
        self.turn.update(keys)
        return [(*key, self.turn[key]) for key in keys]

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
        for memory, now in pairs:
            memory.note(now)
        place = self._place(sigma)
        return torch.cat([memory.predict(now, place) for memory, now in pairs])

    def remember(self, keys: list[tuple], probe, added, sigma) -> None:
        """Notes a whole evaluation. probe, added: (B, N, D), the prompts one after another."""
        count, place = len(keys), self._place(sigma)
        for key, now, delta in zip(keys, probe.chunk(count), added.chunk(count), strict=True):
            before = self.memories.get(key)
            if before is not None:
                self.memories[key] = before.follow(now, delta, place)
            elif self.mode == FIRST_BLOCKS:
                self.memories[key] = _Memory(now, delta)
            else:
                self.memories[key] = MEMORIES[self.mode](now, delta, place=place)

    def _place(self, sigma) -> float:
        """Where an evaluation lies, as forecasts count; read from the device for them alone."""
        if self.mode == FIRST_BLOCKS or sigma is None:
            return 0.0
        return math.log(max(float(sigma.flatten()[0]), _TINY))


class Evaluation:
    """One forward pass through the blocks: decides which to skip, and remembers what those that ran added."""

    def __init__(self, cache: BlockCache, keys: list[tuple], tokens, first: int, last: int, sigma, probe=None):
        self.cache, self.keys, self.first, self.last, self.sigma = cache, keys, first, last, sigma
        self.start, self.probe, self.entered, self.settled = tokens, probe, None, False

    def before(self, index: int, tokens) -> tuple[int, Any]:
        """(the block to run next, its tokens), called in front of block `index`."""
        if index == self.last and not self.settled:
            self._store(tokens)
        if index != self.first or self.entered is not None:
            return index, tokens
        if self.probe is None:
            self.probe = tokens - self.start
        self.entered = tokens
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
        self.cache.remember(self.keys, self.probe, tokens - self.entered, self.sigma)
        self.settled = True


def patched_blocks(options: dict) -> tuple:
    """Which blocks are replaced: a run that skips layers for its guidance has memories of its own."""
    replaced = options.get("patches_replace", {})
    return tuple(frozenset(replaced.get(kind, ())) for kind in ("dit", "attn1", "attn2"))


def window_of(options: dict) -> tuple | None:
    """Which part of the picture the host evaluates as one of its context windows; None for the whole."""
    places = getattr(options.get("context_window"), "index_list", None)
    return None if places is None else tuple(places)


def _controlled(residuals) -> tuple:
    """Whether a ControlNet steers each block after the first, up to the last that it does.

    When one begins or ends, nothing from before is reused.
    """
    steered = [index for index, residual in enumerate(residuals or ()) if residual is not None]
    return tuple(index in steered for index in range(max(steered, default=-1) + 1))
