"""Several encoded datasets in one training, each with its share of what an epoch shows."""

from collections.abc import Sequence
from random import Random

import numpy as np
import torch

from ...quoting import shorten
from ..buckets import Bins
from ..examples import Example, FeatureSet, draw_example, variants_of
from ..identity import digest
from .shares import repeats_of_shares


class JoinedFeatures:
    """A FeatureSet of several. shares: of each, by which it takes its part of an epoch whatever its size.

    Raises ValueError for streams, which have an order of their own, and for captions of several widths.
    """

    def __init__(self, sets: Sequence[FeatureSet], shares: Sequence[float]):
        self.sets, self.shares = list(sets), [float(share) for share in shares]
        for each in self.sets:
            if getattr(each, "blocks", None) is not None:
                raise ValueError(
                    "Streams cannot be mixed: got one among several datasets, expected caches on disk. Train on the "
                    "stream alone, or encode all pictures into one."
                )
        widths = {each[0].caption.shape[-1] for each in self.sets}
        if len(widths) > 1:
            raise ValueError(
                f"Different datasets: got captions of the widths {sorted(widths)}, expected one. Encode all of them "
                f"with one text encoder."
            )
        own = [np.asarray(getattr(each, "repeats", ()), np.float64) for each in self.sets]
        own = [repeats if len(repeats) else np.ones(len(each)) for repeats, each in zip(own, self.sets, strict=True)]
        factors = repeats_of_shares([repeats.sum() for repeats in own], self.shares)
        self.repeats = np.concatenate([repeats * factor for repeats, factor in zip(own, factors, strict=True)])
        self.bins = _join_bins([Bins.of(each.bins) for each in self.sets])
        self.is_prior = np.concatenate([np.asarray(each.is_prior, bool) for each in self.sets])
        self._starts = np.cumsum([0, *map(len, self.sets)])
        self.notes = [
            *(note for each in self.sets for note in getattr(each, "notes", ())),
            *(
                f"{len(each)} pictures, each {factor:.3g} times an epoch"
                for each, factor in zip(self.sets, factors, strict=True)
            ),
        ]

    @property
    def null_caption(self) -> torch.Tensor | None:
        return next((each.null_caption for each in self.sets if each.null_caption is not None), None)

    @property
    def identity(self) -> str:
        """Of all sets and their shares."""
        return digest("joined", *(each.identity for each in self.sets), *map(repr, self.shares))

    def name_of(self, index: int) -> str:
        features, inner = self._place(index)
        return features.name_of(inner)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        features, inner = self._place(index)
        return features[inner]

    def variants_of(self, index: int) -> tuple[list[Example], list[Example]]:
        """See examples.variants_of."""
        return variants_of(*self._place(index))

    def draw(self, index: int, rng: Random) -> Example:
        """A picture in one of its variants."""
        return draw_example(*self._place(index), rng)

    def _place(self, index: int) -> tuple[FeatureSet, int]:
        if not 0 <= index < len(self):
            raise IndexError(shorten(index))
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.sets[which], index - int(self._starts[which])


def _join_bins(parts: Sequence[Bins]) -> Bins:
    sizes, first = np.concatenate([part.sizes for part in parts]), 0
    unique, numbers = np.unique(sizes, axis=0, return_inverse=True)
    ids = []
    for part in parts:
        ids.append(numbers.reshape(-1)[first : first + len(part.sizes)].astype(np.uint16)[part.ids])
        first += len(part.sizes)
    return Bins(unique.astype(np.int32), np.concatenate(ids))
