"""Batches of pictures of one size, in an order that can be continued and shared out among processes."""

from collections import defaultdict
from collections.abc import Sequence
from random import Random


class BucketSampler:
    """An endless iterator of lists of `batch_size` indices, all of one bin; an epoch shows every picture.

    bins: (h_latent, w_latent) of each picture. Each epoch has an order of its own, by seed and epoch alone.
    A bin's last batch is filled up with further pictures of the same bin, the first of its order, so every batch is
    full: a mean over it, and over equal parts of it in several processes, weighs as one over the rest alone would.
    With drop_last such a batch is left out instead, as in PixArt's own training.
    is_prior: which pictures DreamBooth is to keep. With them, the smaller group is repeated until it has as many
    pictures as the other in an epoch, so that a few pictures of a subject are not lost among many of its class.
    world_size, rank: all processes together see what one process with world_size times the batch size would see.
    `epoch` and `position` (global batches of this epoch that were given out) tell where the iterator is.
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
    ):
        if batch_size < 1:
            raise ValueError(f"Batch size out of range: got {batch_size}, expected at least 1. Enter 1 or more.")
        if not bins:
            raise ValueError("Empty dataset: got no pictures, expected at least one. Connect a dataset with pictures.")
        self.bins, self.batch_size, self.seed, self.drop_last = list(bins), batch_size, seed, drop_last
        self.world_size, self.rank = world_size, rank
        self._shown = _balanced(is_prior or [False] * len(bins))
        self.epoch, self.position = 0, 0
        self._order = self._shuffle(0)
        if not self._order:
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
        return len(self._order)

    def __iter__(self) -> "BucketSampler":
        return self

    def __next__(self) -> list[int]:
        if self.position == len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._shuffle(self.epoch)
        batch = self._order[self.position]
        self.position += 1
        return batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

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
        self._order = self._shuffle(self.epoch)

    def _identity(self) -> dict:
        counts: dict[str, int] = defaultdict(int)
        for height, width in (self.bins[index] for index in self._shown):
            counts[f"{height}x{width}"] += 1
        return {"bins": dict(sorted(counts.items())), "global_batch": self._global_size, "drop_last": self.drop_last}

    def _shuffle(self, epoch: int) -> list[list[int]]:
        rng = Random(f"{self.seed} {epoch}")  # of a text: its hash does not depend on the process
        buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index in rng.sample(self._shown, len(self._shown)):
            buckets[tuple(self.bins[index])].append(index)
        batches = [batch for bucket in buckets.values() for batch in self._cut(bucket)]
        rng.shuffle(batches)
        return batches

    def _cut(self, bucket: list[int]) -> list[list[int]]:
        size = self._global_size
        if self.drop_last:
            return [bucket[start : start + size] for start in range(0, len(bucket) - size + 1, size)]
        filled = bucket + [bucket[i % len(bucket)] for i in range(-len(bucket) % size)]
        return [filled[start : start + size] for start in range(0, len(filled), size)]


def _balanced(is_prior: Sequence[bool]) -> list[int]:
    """The pictures that an epoch shows: each group as often as the larger one, where there are both."""
    groups = [[index for index, prior in enumerate(is_prior) if prior == kind] for kind in (False, True)]
    if not all(groups):
        return list(range(len(is_prior)))
    most = max(map(len, groups))
    return [group[number % len(group)] for group in groups for number in range(most)]
