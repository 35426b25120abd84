"""What is to be encoded, in columns: captions by their keys, and pictures by theirs with what is to be done to them."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..variety.views import PLAIN, View
from .rows import KEY_BYTES

PICTURE, CONTROL, EDGES, MASK_KIND = KINDS = ("picture", "control", "edges", "mask")


class _Keys:
    """Keys that come one by one; each may come several times."""

    def __init__(self):
        self._bytes = bytearray()

    def add(self, key: str) -> None:
        self._bytes += bytes.fromhex(key)

    def __len__(self) -> int:
        return len(self._bytes) // KEY_BYTES

    def all(self) -> np.ndarray:
        """(N, 20) uint8."""
        return np.frombuffer(bytes(self._bytes), np.uint8).reshape(-1, KEY_BYTES)

    def text(self, number: int) -> str:
        return self._bytes[number * KEY_BYTES : (number + 1) * KEY_BYTES].hex()

    def firsts(self) -> np.ndarray:
        """The numbers of those that did not come before, in their order."""
        codes = self.all().view(f"V{KEY_BYTES}").reshape(-1)
        return np.sort(np.unique(codes, return_index=True)[1])


class CaptionPlan:
    """Captions to be encoded: keys, and where their texts are.

    text_of: (number of a record, number of its caption) -> the text; a record of -1 is the empty caption.
    """

    def __init__(self, text_of: Callable[[int, int], str]):
        self.keys, self._text_of = _Keys(), text_of
        self._sources, self._lengths = array("i"), array("i")

    def add(self, key: str, record: int, variant: int, length: int) -> None:
        """Add one, again or not. length: of its text."""
        self.keys.add(key)
        self._sources.extend((record, variant))
        self._lengths.append(length)

    def text(self, number: int) -> str:
        """Of the caption of a number."""
        return self._text_of(*self._sources[2 * number : 2 * number + 2])

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Those of the texts of some numbers."""
        return np.array(self._lengths, np.int64)[numbers]


@dataclass(frozen=True)
class Job:
    """A picture to be encoded under a key. kind: of KINDS. record: the number of its record. content: its digest.

    bin_px: (height, width) that it is fitted into, by this method.
    """

    key: str
    kind: str
    record: int
    content: str
    bin_px: tuple[int, int]
    method: str
    view: View = PLAIN


class PicturePlan:
    """Jobs by number."""

    def __init__(self):
        self.keys, self._contents = _Keys(), _Keys()
        self._records, self._kinds, self._fits, self._views = array("i"), array("b"), array("h"), array("i")
        self._fit_numbers: dict[tuple, int] = {}
        self._floats = array("d")  # of the views that are not plain, eight each

    def add(self, job: Job) -> str:
        """Add one, again or not; returns its key."""
        self.keys.add(job.key)
        self._contents.add(job.content)
        self._records.append(job.record)
        self._kinds.append(KINDS.index(job.kind))
        self._fits.append(self._fit_numbers.setdefault((job.bin_px, job.method), len(self._fit_numbers)))
        self._views.append(-1 if job.view == PLAIN else len(self._floats) // 8)
        if job.view != PLAIN:
            view = job.view
            self._floats.extend((view.x, view.y, view.zoom, view.flipped))
            self._floats.extend((view.brightness, view.contrast, view.saturation, view.hue))
        return job.key

    def job(self, number: int) -> Job:
        """The job of a number."""
        fit, place = list(self._fit_numbers)[self._fits[number]], self._views[number]
        view = PLAIN
        if place >= 0:
            x, y, zoom, flipped, *colours = self._floats[place * 8 : place * 8 + 8]
            view = View(x, y, zoom, bool(flipped), *colours)
        kind, record = KINDS[self._kinds[number]], self._records[number]
        return Job(self.keys.text(number), kind, record, self._contents.text(number), *fit, view)

    def runs(self, numbers: np.ndarray) -> list[np.ndarray]:
        """The same numbers, those of one bin and way of encoding behind each other and apart from others."""
        fits = list(self._fit_numbers)
        ranks = {fit: rank for rank, fit in enumerate(sorted(fits))}
        by_fit = np.array([ranks[fit] for fit in fits], np.int64)
        kinds = np.array([0, 0, 1, 2])[np.array(self._kinds)[numbers]] if len(numbers) else numbers
        groups = by_fit[np.array(self._fits)[numbers]] * 3 + kinds if len(numbers) else numbers
        order = np.argsort(groups, kind="stable")
        cuts = np.flatnonzero(np.diff(groups[order])) + 1
        return [run for run in np.split(numbers[order], cuts) if len(run)]
