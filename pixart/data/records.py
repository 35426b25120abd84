"""A dataset before it is encoded: its pictures, captions and control pictures, and the table of what is wrong."""

from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..files.names import is_blank
from ..quoting import shorten
from .identity import DIGEST_BYTES, digest
from .pictures import decode_picture, has_alpha, measure_picture
from .storage.table import Record, RecordTable
from .variety.masks import AlphaPicture

EXTREME_RATIO = 4.5  # PixArt's bins end at 4; PixArt-Sigma's own training left out what is wider than this
POLICIES = ("skip", "error")
_SHOWN_ROWS = 40
_READERS = 4
_READ_AHEAD = 256


@dataclass(frozen=True)
class Finding:
    """One row of the table. kind: such as 'no caption'. Rows that are not `fatal` are notes."""

    kind: str
    name: str
    detail: str
    fatal: bool = True


@dataclass(frozen=True)
class Dataset:
    """Records that passed the check, and the table of it."""

    records: Sequence[Record]
    report: str

    def __len__(self) -> int:
        return len(self.records)

    def __add__(self, other: "Dataset") -> "Dataset":
        return Dataset(RecordTable(self.records) + other.records, f"{self.report}\n\n{other.report}")


class _Sights:
    """What reading each picture gave: its content's digest, its size and whether it has alpha, or the error."""

    def __init__(self):
        self._digests, self._sizes, self.has_alpha = bytearray(), array("i"), bytearray()
        self.errors: dict[int, str] = {}

    def add(self, seen: "_Seen") -> None:
        if seen.error is not None:
            self.errors[len(self)] = seen.error
        self._digests += bytes.fromhex(seen.digest) if seen.digest else bytes(DIGEST_BYTES)
        self.has_alpha.append(seen.has_alpha)
        self._sizes.extend(seen.size_px)

    def __len__(self) -> int:
        return len(self.has_alpha)

    def size_px(self, number: int) -> tuple[int, int]:
        return self._sizes[2 * number], self._sizes[2 * number + 1]

    def contents(self) -> np.ndarray:
        """(N,) a number for each different content."""
        codes = np.frombuffer(bytes(self._digests), f"V{DIGEST_BYTES}")
        return np.unique(codes, return_inverse=True)[1].reshape(-1)


@dataclass(frozen=True)
class _Seen:
    digest: str = ""
    size_px: tuple[int, int] = (0, 0)
    has_alpha: bool = False
    error: str | None = None


def wrong_table(path: Path, got: str, expected: str) -> ValueError:
    """The error for a dataset's file with another content."""
    return ValueError(f"Dataset cannot be read: got {got} in {path.name}, expected {expected}. Correct the file.")


def check_records(
    records: Sequence[Record],
    *,
    smallest_px: int = 0,
    policy: str = POLICIES[0],
    fallback_caption: str = "",
    is_prior: bool = False,
    progress: Callable[[int, int, None], None] | None = None,
) -> Dataset:
    """Read every picture, and keep the records that can be trained with.

    smallest_px: pictures whose shorter side is less are too small; 0 lets all pass. policy: "skip" leaves out what is
    wrong, "error" refuses the dataset. fallback_caption: for pictures without one. is_prior: marks the records.
    progress: called with how many of how many are read; what it raises ends the reading.
    Raises ValueError with the table for policy "error", and when nothing is left.
    """
    if policy not in POLICIES:
        raise ValueError(
            f"Unknown policy: got {shorten(policy)}, expected one of {', '.join(POLICIES)}. Choose one of them."
        )
    if not records:
        raise ValueError("Empty dataset: got no pictures, expected at least one. Choose a folder or file with some.")
    records = RecordTable(_settle(record, fallback_caption, is_prior) for record in records)
    sights = _read_all(records, progress)
    kept, findings = _sort_out(records, sights, smallest_px)
    if any(record.control for record in kept):
        findings += [
            Finding("no control", record.name, "needed to train a ControlNet", False)
            for record in kept
            if not record.control
        ]
    report = describe(kept, findings)
    if policy == "error" and any(finding.fatal for finding in findings):
        raise ValueError(f"Dataset with problems:\n{report}\nMend them, or choose to skip such pictures.")
    if not kept:
        raise ValueError(
            f"No usable picture: got {len(records)} entries, expected at least one with a readable picture and a "
            f"caption. Mend what the table names.\n{report}"
        )
    return Dataset(kept, report)


def _settle(record: Record, fallback_caption: str, is_prior: bool) -> Record:
    given = (_mend_text((text or "").strip()) for text in (record.caption, fallback_caption))
    caption = next((text for text in given if not is_blank(text)), None)
    others = tuple(filter(lambda text: not is_blank(text), (_mend_text(text.strip()) for text in record.others)))
    settled = {"name": _mend_text(record.name), "caption": caption, "others": others}
    return replace(record, **settled, is_prior=record.is_prior or is_prior)


def _mend_text(text: str) -> str:
    """Text that can be written: halves of letters, as JSON and names of files may hold them, become a sign."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_all(records: Sequence[Record], progress: Callable | None) -> _Sights:
    pool, sights = ThreadPoolExecutor(_READERS), _Sights()
    try:
        for start in range(0, len(records), _READ_AHEAD):  # since what is asked of a pool waits in its memory
            for seen in pool.map(_read, records[start : start + _READ_AHEAD]):
                sights.add(seen)
                if progress is not None:
                    progress(len(sights), len(records), None)
    finally:
        pool.shutdown(cancel_futures=True)
    return sights


def _read(record: Record) -> _Seen:
    """Decode the whole picture, since a cut file shows itself only so, and the control picture."""
    if record.problem or record.picture is None:
        return _Seen(error=record.problem or "no picture")
    whose = ""
    try:
        content = record.picture.content()
        is_see_through = has_alpha(decode_picture(record.picture, content))
        size_px = measure_picture(record.picture, content)
        for name, other in (("control picture: ", record.control), ("mask: ", record.mask)):
            whose = name
            if other is not None:
                decode_picture(other, other.content())
    except (OSError, ValueError) as error:
        return _Seen(error=f"{whose}{error}")
    return _Seen(digest(content), size_px, is_see_through)


def _sort_out(records: RecordTable, sights: _Sights, smallest_px: int) -> tuple[RecordTable, list[Finding]]:
    """(the records that can be trained with, what was found)."""
    kept, findings, contents = RecordTable(), [], sights.contents()
    firsts = np.full(int(contents.max()) + 1, -1, np.int64)  # of each content the first record that is kept
    for number, record in enumerate(records):
        twin = int(firsts[contents[number]])
        twin = records[twin] if twin >= 0 else None
        found = _judge(record, sights.errors.get(number), sights.size_px(number), smallest_px, twin)
        findings += found
        if any(finding.fatal for finding in found):
            continue
        if isinstance(record.mask, AlphaPicture) and not sights.has_alpha[number]:
            record = replace(record, mask=None)
        kept.add(record)
        if twin is None:
            firsts[contents[number]] = number
    return kept, findings


def _judge(record: Record, error: str | None, size_px, smallest_px: int, twin: Record | None) -> list[Finding]:
    """What is wrong with a record. twin: another one with the same picture, or None."""
    found = []

    def add(kind: str, detail: str, fatal: bool = True) -> None:
        found.append(Finding(kind, record.name, detail, fatal))

    if record.caption is None:
        add("no caption", "add a .txt file or a caption in the table")
    if error:
        add("unreadable", error)
        return found
    height, width = size_px
    if min(height, width) < smallest_px:
        add("too small", f"{width} x {height} px, expected at least {smallest_px} on the shorter side")
    if max(height, width) > EXTREME_RATIO * min(height, width):
        add("too narrow", f"{width} x {height} px, expected sides of at most 1 to {EXTREME_RATIO:g}")
    if twin is not None:
        same = twin.caption == record.caption
        detail = f"the same picture as {twin.name}" + ("" if same else ", with another caption: kept")
        add("duplicate", detail, fatal=same)
    return found


def describe(kept: Sequence[Record], findings: Sequence[Finding]) -> str:
    """The table: how many are used, how many have which problem, and each of them by name."""
    names = {finding.name for finding in findings if finding.fatal}
    controls = masks = prior = 0
    for record in kept:
        controls += record.control is not None
        masks += record.mask is not None
        prior += record.is_prior
    lines = [
        f"{len(kept)} pictures"
        + (f", {controls} with a control picture" if controls else "")
        + (f", {masks} with a mask" if masks else "")
        + (f", {prior} of the class to keep" if prior else "")
        + (f"; {len(names)} left out" if names else "")
    ]
    if not findings:
        return lines[0]
    rows = [(finding.kind, finding.name, finding.detail) for finding in findings]
    kinds = sorted({row[0] for row in rows})
    lines.append(", ".join(f"{kind}: {sum(row[0] == kind for row in rows)}" for kind in kinds))
    table = [("problem", "picture", "what"), *rows[:_SHOWN_ROWS]]
    first, second = (max(len(row[column]) for row in table) for column in range(2))
    lines += [f"{kind:<{first}}  {name:<{second}}  {detail}" for kind, name, detail in table]
    if len(rows) > _SHOWN_ROWS:
        lines.append(f"... and {len(rows) - _SHOWN_ROWS} more")
    return "\n".join(lines)
