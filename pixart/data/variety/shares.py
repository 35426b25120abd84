"""How often each picture is shown in an epoch: repeats, parts of them, and pictures of a class in balance."""

import re
from collections.abc import Sequence
from random import Random

import numpy as np

from ...quoting import shorten
from .orders import Draws, permute

MOST_REPEATS = 10_000.0
_KOHYA = re.compile(r"([0-9]{1,4})_(.+)")


class Showing:
    """Which pictures each epoch shows: as many of each group in every one, so that all epochs are of one length.

    groups: (N,) the bin or block of each picture. is_prior: which pictures DreamBooth is to keep; where there are some,
    the smaller kind is repeated until an epoch shows as many of it as of the other. repeats: (N,) or () how often each
    is shown: 3 is three times in each epoch, 0.25 about every fourth, 2.5 twice and by turns once more. The odd ones
    are drawn anew for each epoch, by seed and epoch alone; each group has as many in all epochs, at least one.
    held_out: numbers of pictures that are never shown.
    """

    def __init__(
        self,
        groups: np.ndarray,
        is_prior: Sequence[bool],
        repeats: Sequence[float],
        seed: int,
        held_out: Sequence[int] = (),
    ):
        self.groups, self.seed = groups, seed
        marks, given = np.asarray(is_prior, bool), np.asarray(repeats, np.float64)
        self._marks = marks if marks.any() and not marks.all() else None
        if len(held_out):
            given = given.copy() if len(given) else np.ones(len(groups))
            given[np.asarray(held_out, np.int64)] = 0
        self._repeats = given if len(given) and not (given == 1).all() else None

    def of(self, epoch: int) -> np.ndarray | None:
        """The pictures of an epoch, each as often as it is shown; None for all of them once."""
        if self._marks is None:
            return None if self._repeats is None else self._repeated(None, epoch)
        kinds = [np.flatnonzero(self._marks == kind).astype(np.uint32) for kind in (False, True)]
        if self._repeats is not None:
            kinds = [self._repeated(rows, epoch) for rows in kinds]
        most = max(map(len, kinds))
        return np.concatenate([np.resize(kind, most) for kind in kinds])

    def _repeated(self, rows: np.ndarray | None, epoch: int) -> np.ndarray:
        rows = np.arange(len(self.groups), dtype=np.uint32) if rows is None else rows
        repeats = self._repeats[rows]
        whole = np.floor(repeats)
        rest = repeats - whole
        # Odd ones lie behind the others by group, so that what stands at a place is of one group in all epochs.
        return np.concatenate([np.repeat(rows, whole.astype(np.int64)), *self._odd(rows, rest, epoch)])

    def _odd(self, rows: np.ndarray, rest: np.ndarray, epoch: int) -> list[np.ndarray]:
        chosen, rows, rest = [], rows[rest > 0], rest[rest > 0]
        groups = self.groups[rows]
        for group in np.unique(groups).tolist():
            own = np.flatnonzero(groups == group)
            name = f"{self.seed} {epoch} odd {group}"
            own = own[np.frombuffer(permute(len(own), Draws(name).falling(len(own), 2)), np.uint32)]
            count = max(round(float(rest[own].sum())), 1)
            ends = np.cumsum(rest[own])
            points = (np.arange(count) + Random(name).random()) * (ends[-1] / count)
            chosen.append(rows[own[np.minimum(np.searchsorted(ends, points, side="right"), len(own) - 1)]])
        return chosen


def check_repeats(value: float, what: str = "repeats") -> float:
    """A number of repeats. Raises ValueError for what is none."""
    if not 0 < value <= MOST_REPEATS:
        raise ValueError(
            f"{what.capitalize()} out of range: got {value:g}, expected more than 0 and at most {MOST_REPEATS:g}. "
            f"Enter 1 to show each picture once in an epoch."
        )
    return float(value)


def named_folder(name: str) -> tuple[int, str] | None:
    """(repeats, what it shows) of a folder's name such as `10_my cat`, as kohya's trainers read it; None for others."""
    found = _KOHYA.fullmatch(name)
    return (int(found[1]), found[2]) if found and int(found[1]) else None


def repeats_of_shares(counts: Sequence[float], shares: Sequence[float]) -> list[float]:
    """Repeats by which sets take their shares of an epoch, whatever their sizes; the least is 1.

    counts: how many pictures are shown of each set without them. shares: such as 3 and 1 for three quarters.
    Raises ValueError for shares that are no positive numbers.
    """
    wrong = [share for share in shares if not 0 < share < float("inf")]
    if wrong:
        raise ValueError(
            f"Share out of range: got {shorten(wrong[0])}, expected a number above 0, such as 3 and 1 for three "
            f"quarters of what is shown. Correct it."
        )
    needed = [share / max(count, 1) for share, count in zip(shares, counts, strict=True)]
    return [each / min(needed) for each in needed]
