"""Batches of pictures of one size, in an order that can be continued and shared out among processes."""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..config import LATENT_DOWNSCALE
from ..resolution import ASPECT_RATIOS
from .variety.orders import Draws, permute
from .variety.shares import Showing

GRID_PX = 2 * LATENT_DOWNSCALE
_BLOCKS_AT_ONCE = 4


class Bins(Sequence):
    """(h_latent, w_latent) of many pictures in two or four bytes each.

    sizes: (K, 2) integers, all sizes that there are. ids: (N,) integers below K, which of them each picture has.
    """

    def __init__(self, sizes: np.ndarray, ids: np.ndarray):
        self.sizes, self.ids = np.asarray(sizes), ids

    @classmethod
    def of(cls, bins: Sequence[tuple[int, int]]) -> "Bins":
        """The same bins in this form."""
        if isinstance(bins, Bins):
            return bins
        numbers: dict[tuple[int, int], int] = {}
        ids = array("I", (numbers.setdefault((int(height), int(width)), len(numbers)) for height, width in bins))
        return cls(np.array(list(numbers), np.int32).reshape(-1, 2), np.array(ids, id_type(len(numbers))))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return tuple(self.sizes[self.ids[index]].tolist())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        sizes = [tuple(size) for size in self.sizes.tolist()]
        return (sizes[number] for number in self.ids)

    def counts(self, shown: np.ndarray | slice = slice(None)) -> dict[tuple[int, int], int]:
        """How many pictures each size has, of all or of those shown; sizes without any are left out."""
        found = np.bincount(self.ids[shown], minlength=len(self.sizes)).tolist()
        return {tuple(size): count for size, count in zip(self.sizes.tolist(), found, strict=True) if count}


def id_type(count: int) -> type:
    """The smallest integers that count so many."""
    return np.uint16 if count <= 2**16 else np.uint32


class BucketSampler:
    """An endless iterator of lists of `batch_size` indices, all of one bin; an epoch shows every picture.

    bins: (h_latent, w_latent) of each picture. Each epoch has an order of its own, by seed and epoch alone.
    A bin's last batch is filled up with further pictures of the same bin, the first of its order, so every batch is
    full: a mean over it, and over equal parts of it in several processes, weighs as one over the rest alone would.
    With drop_last such a batch is left out instead, as in PixArt's own training.
    is_prior: which pictures DreamBooth is to keep. With them, the smaller group is repeated until it has as many
    pictures as the other in an epoch, so that a few pictures of a subject are not lost among many of its class.
    repeats: how often each picture is shown in an epoch, see variety.shares.Showing; () is once.
    world_size, rank: all processes together see what one process with world_size times the batch size would see.
    `epoch` and `position` (global batches of this epoch that were given out) tell where the iterator is.
    An order takes about eight bytes a picture.
    blocks: (N,) for pictures that are read in blocks, of one size each: which one each is in. Pictures are shuffled
    within their block and a block's last batch is filled up as a bin's is; a few blocks are drawn from at a time.
    ahead: called with the blocks that will be drawn from next.
    held_out: numbers of pictures that are never given out.
    Raises ValueError for no pictures, for a batch size below 1, and when drop_last leaves nothing.
    """

    def __init__(
        self,
        bins: Sequence[tuple[int, int]],
        batch_size: int,
        seed: int = 0,
        drop_last: bool = False,
        world_size: int = 1,
        rank: int = 0,
        is_prior: Sequence[bool] = (),
        blocks: np.ndarray | None = None,
        ahead: Callable[[list[int]], None] | None = None,
        repeats: Sequence[float] = (),
        held_out: Sequence[int] = (),
    ):
        if batch_size < 1:
            raise ValueError(f"Batch size out of range: got {batch_size}, expected at least 1. Enter 1 or more.")
        if not len(bins):
            raise ValueError("Empty dataset: got no pictures, expected at least one. Connect a dataset with pictures.")
        self.bins, self.batch_size, self.seed, self.drop_last = Bins.of(bins), batch_size, seed, drop_last
        self.world_size, self.rank = world_size, rank
        self._groups, self._blocks, self._ahead = self.bins.ids if blocks is None else blocks, blocks, ahead
        self._showing = Showing(self._groups, is_prior, repeats, seed, held_out)
        shown = self._showing.of(0)
        shown = slice(None) if shown is None else shown
        self._counts = self.bins.counts(shown)
        self._per_epoch = sum(map(self._batches_of, np.bincount(self._groups[shown]).tolist()))
        self.epoch, self.position = 0, 0
        self._order: tuple[int, np.ndarray, array] | None = None
        self._rounds: list[list[int]] = []  # the blocks that are drawn from at a time
        self._starts: list[int] = []  # where that begins in the order
        if not self.batches_per_epoch:
            raise ValueError(
                f"No full batch: got {len(bins)} pictures, none of whose sizes has {self._global_size} of them, "
                f"expected one. Lower the batch size, or keep incomplete batches."
            )

    @property
    def _global_size(self) -> int:
        return self.batch_size * self.world_size

    @property
    def batches_per_epoch(self) -> int:
        """How many batches each process gets in an epoch; it is the same for every epoch."""
        return self._per_epoch

    def _batches_of(self, count: int) -> int:
        return (count if self.drop_last else count + self._global_size - 1) // self._global_size

    def __iter__(self) -> "BucketSampler":
        return self

    def __next__(self) -> list[int]:
        if self.position >= self.batches_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0
        is_new = False
        if self._order is None or self._order[0] != self.epoch:
            self._order = None  # before the next one takes its room
            self._order = (self.epoch, *self._shuffle(self.epoch))
            is_new = True
        _, batches, places = self._order
        if self._ahead is not None:
            self._announce(is_new)
        batch = batches[places[self.position]]
        self.position += 1
        return batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size].tolist()

    def state_dict(self) -> dict:
        """Where the iterator is, in plain numbers."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, **self._identity()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state_dict, also with another number of processes as long as the global batch is the same.

        Raises ValueError when it is of other pictures or batches, whose order would be another.
        """
        own = self._identity()
        wrong = [name for name in own if state.get(name) != own[name]]
        if wrong:
            got, expected = ({name: source.get(name) for name in wrong} for source in (own, state))
            raise ValueError(
                f"Training cannot be continued with other data: got {got}, expected {expected}. "
                f"Use the dataset and batch size that it was begun with, or begin a new training."
            )
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._showing.seed = self.seed
        self._order = None

    def _identity(self) -> dict:
        counts = {f"{height}x{width}": count for (height, width), count in self._counts.items()}
        own = {"bins": dict(sorted(counts.items())), "global_batch": self._global_size, "drop_last": self.drop_last}
        return own if self._blocks is None else {**own, "blocks": int(self._blocks.max()) + 1}

    def _announce(self, is_new: bool) -> None:
        """Say what comes next, at the beginning of each round and where the iterator begins."""
        number = bisect_right(self._starts, self.position) - 1
        if is_new:
            self._ahead(self._rounds[number])
        if (is_new or self._starts[number] == self.position) and number + 1 < len(self._rounds):
            self._ahead(self._rounds[number + 1])

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, array]:
        """((M, global batch) indices, the order of these batches), as Random.sample and Random.shuffle would give."""
        draws = Draws(f"{self.seed} {epoch}")  # of a text: its hash does not depend on the process
        shown = self._showing.of(epoch)
        count = len(self.bins) if shown is None else len(shown)
        order = np.frombuffer(permute(count, draws.falling(count, 1)), np.uint32)[::-1]
        order = order if shown is None else shown[order]
        groups = self._groups[order]
        grouped = np.argsort(groups, kind="stable")
        ends = np.cumsum(np.bincount(groups))
        runs = [run for run in np.split(grouped, ends[:-1]) if len(run)]
        runs.sort(key=lambda run: run[0])  # the bin of the first picture first
        size = self._global_size
        batches = [np.resize(order[run], (self._batches_of(len(run)), size)) for run in runs]
        joined = np.concatenate(batches)
        if self._blocks is None:
            return joined, permute(len(joined), draws.falling(len(joined), 2))
        return joined, self._by_rounds(
            draws, [(int(groups[run[0]]), len(own)) for run, own in zip(runs, batches, strict=True)]
        )

    def _by_rounds(self, draws: "Draws", blocks: list[tuple[int, int]]) -> array:
        """The order of batches, given (block, its batches) in turn: that of a few blocks, then that of the next."""
        places, self._rounds, self._starts = array("I"), [], []
        for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
            some = blocks[first : first + _BLOCKS_AT_ONCE]
            start, count = len(places), sum(batches for _, batches in some)
            self._starts.append(start)
            self._rounds.append([int(block) for block, _ in some])
            places.extend(start + place for place in permute(count, draws.falling(count, 2)))
        return places


def training_bins(base_px: int, square: bool = False) -> dict[float, tuple[int, int]]:
    """{nominal ratio: (height_px, width_px)}: PixArt's table, or for another size the table scaled to whole tokens."""
    if square:
        side = _to_grid(base_px)
        return {1.0: (side, side)}
    if base_px in ASPECT_RATIOS:
        return ASPECT_RATIOS[base_px]
    table = ASPECT_RATIOS[1024].items()
    return {ratio: (_to_grid(h * base_px / 1024), _to_grid(w * base_px / 1024)) for ratio, (h, w) in table}


def _to_grid(side_px: float) -> int:
    return max(round(side_px / GRID_PX), 1) * GRID_PX
