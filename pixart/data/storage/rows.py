"""Rows of a dataset's list while it is made, in columns of numbers and bytes."""

from array import array
from collections.abc import Callable, Iterable, Mapping

import numpy as np

KEY_BYTES = 20
PARTS = ("caption", "picture", "hint")  # which have a key in each row
MASK = "mask"  # the same, in lists that have some
TEXTS = ("name", "text")
RECORD = "record"  # in the lists of shares: the number of each row's record in the whole source
GROUP = "group"  # rows of one number are variants of one picture, and lie behind each other
# What a row may have beside: its type, and what stands for it where a row has none.
FURTHER = {RECORD: ("q", 0), GROUP: ("i", 0), "repeats": ("d", 1.0), "weight": ("d", 1.0)}


class Rows:
    """Rows by number. Those without a hint or mask have a key of zeros, and False in `has`.

    texts_of: (number of a record, number of its caption) -> (name, text), for rows that say those as `record_number`
    and `variant` in place of their texts.
    """

    def __init__(self, rows: Iterable[Mapping] = (), texts_of: Callable[[int, int], tuple[str, str]] | None = None):
        self._texts_of, self._sources = texts_of, array("i")
        self._keys = {part: bytearray() for part in (*PARTS, MASK)}
        self._has = {part: array("b") for part in (*PARTS, MASK)}
        self._bytes = {text: bytearray() for text in TEXTS}
        self._ends = {text: array("q") for text in TEXTS}
        self._sizes, self._ratios, self._marks = array("i"), array("d"), array("B")
        self._further = {name: array(kind) for name, (kind, _) in FURTHER.items()}
        self._found: set[str] = set()  # which of them some row has
        for row in rows:
            self.add(row)

    def __len__(self) -> int:
        return len(self._marks)

    def add(self, row: Mapping) -> None:
        """Add a row of plain values. Keys are hexadecimal, or None for a hint or mask that there is not."""
        for part, keys in self._keys.items():
            key = row[part] if part in PARTS else row.get(part)
            if key is None and not keys:
                continue  # until the first one that there is
            keys += bytes((len(self) - len(self._has[part])) * KEY_BYTES)
            keys += bytes(KEY_BYTES) if key is None else _key_bytes(key)
            self._has[part].extend([False] * (len(self) - len(self._has[part])))
            self._has[part].append(key is not None)
        if self._texts_of is None:
            self._add_texts(self._bytes, self._ends, [row[text] for text in TEXTS])
        else:
            self._sources.extend((row["record_number"], row["variant"]))
        self._sizes.extend(row["size_px"])
        self._ratios.append(row["aspect_ratio"])
        self._marks.append(row["is_prior"])
        for name, (_, usual) in FURTHER.items():
            value = row.get(name)
            if value is not None and (value != usual or name in (RECORD, GROUP)):
                self._found.add(name)
            self._further[name].append(usual if value is None else value)

    @staticmethod
    def _add_texts(data: dict[str, bytearray], ends: dict[str, array], texts: Iterable[str]) -> None:
        for which, text in zip(TEXTS, texts, strict=True):
            data[which] += text.encode("utf-8", "replace")
            ends[which].append(len(data[which]))

    def keys(self, part: str) -> np.ndarray:
        """(N, 20) uint8."""
        if not self._keys[part]:
            return np.zeros((len(self), KEY_BYTES), np.uint8)
        return np.frombuffer(bytes(self._keys[part]), np.uint8).reshape(-1, KEY_BYTES)

    def has(self, part: str) -> np.ndarray:
        """(N,) bool: which rows have a key of this part."""
        return np.array(self._has[part], bool) if self._keys[part] else np.zeros(len(self), bool)

    def text(self, which: str, row: int) -> str:
        """The `name` or the `text` of a row."""
        if self._texts_of is not None:
            return self._texts_of(*self._sources[2 * row : 2 * row + 2])[TEXTS.index(which)]
        ends = self._ends[which]
        return self._bytes[which][ends[row - 1] if row else 0 : ends[row]].decode("utf-8", "replace")

    def columns(self) -> dict[str, np.ndarray]:
        """What an index holds of them as it is."""
        data, ends = self._bytes, self._ends
        if self._texts_of is not None:
            data, ends = {text: bytearray() for text in TEXTS}, {text: array("q") for text in TEXTS}
            for row in range(len(self)):
                self._add_texts(data, ends, self._texts_of(*self._sources[2 * row : 2 * row + 2]))
        found = {f"{text}_bytes": np.frombuffer(data[text], np.uint8) for text in TEXTS}
        found |= {f"{text}_end": np.array(ends[text], np.int64) for text in TEXTS}
        found |= {
            "size_px": np.array(self._sizes, np.int32).reshape(-1, 2),
            "aspect_ratio": np.array(self._ratios, np.float64),
            "is_prior": np.array(self._marks, np.uint8),
        }
        groups = np.array(self._further[GROUP], np.int32)
        is_varied = GROUP in self._found and bool((groups[1:] == groups[:-1]).any())
        names = [name for name in FURTHER if name in self._found and (name != GROUP or is_varied)]
        return found | {name: np.array(self._further[name]) for name in names}


def _key_bytes(key: str) -> bytes:
    data = bytes.fromhex(key)
    if len(data) != KEY_BYTES:
        raise ValueError("a key of another length")
    return data
