"""Orders of many things, as Python's Random would shuffle them, at the speed of numpy."""

from array import array
from collections.abc import Iterator
from random import Random

import numpy as np

_DRAWN_AT_ONCE = 2**16
_SWAPPED_ONE_BY_ONE = 64


class Draws:
    """The numbers that Python's Random draws, many at once."""

    def __init__(self, seed: str):
        words = Random(seed).getstate()[1]
        self._words = np.random.MT19937()
        self._words.state = {
            "bit_generator": "MT19937",
            "state": {"key": np.array(words[:-1], np.uint32), "pos": words[-1]},
        }

    def falling(self, most: int, least: int) -> Iterator[np.ndarray]:
        """Numbers below most, below most - 1, and so on to below least, as Random._randbelow gives them one by one."""
        while most >= least:
            bits = most.bit_length()
            wanted = min(most - max(least, 1 << (bits - 1)) + 1, _DRAWN_AT_ONCE)
            drawn = self._words.random_raw(wanted) >> np.uint64(32 - bits)
            kept = _accept(drawn, most)
            most -= len(kept)
            yield kept


def _accept(drawn: np.ndarray, most: int) -> np.ndarray:
    """Those drawn that are below a limit, which begins at `most` and falls by one with each that is."""
    is_kept = drawn < most - len(drawn) + 1
    before, extra = np.cumsum(is_kept), 0
    for place in np.flatnonzero(~is_kept & (drawn < most)).tolist():
        if drawn[place] < most - before[place] - extra:
            is_kept[place] = True
            extra += 1
    return drawn[is_kept]


def permute(count: int, draws: Iterator[np.ndarray]) -> array:
    """0 ... count - 1 in the order that Random.shuffle would give them.

    Runs of swaps are made at once where none of them touches what another one does, which in long lists is the rule.
    """
    items, last = array("I", range(count)), count - 1
    view = np.frombuffer(items, np.uint32)
    for drawn in draws:
        start = 0
        while start < len(drawn):
            places = drawn[start : start + max(int((last / 8) ** 0.5), _SWAPPED_ONE_BY_ONE)].astype(np.intp)
            start += len(places)
            lasts = slice(last - len(places) + 1, last + 1)
            ordered = np.sort(places)
            if len(places) > _SWAPPED_ONE_BY_ONE and ordered[-1] < lasts.start and (ordered[1:] > ordered[:-1]).all():
                view[lasts], view[places] = view[places[::-1]], view[lasts][::-1].copy()
            else:
                for offset, place in enumerate(places.tolist()):
                    items[place], items[last - offset] = items[last - offset], items[place]
            last -= len(places)
    return items
