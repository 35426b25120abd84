"""A dataset before it is encoded: its pictures, captions and control pictures, and the table of what is wrong."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ..files.names import is_blank
from ..quoting import shorten
from .identity import digest
from .pictures import Picture, decode_picture, measure_picture
from .variety.views import ViewVariety

EXTREME_RATIO = 4.5  # PixArt's bins end at 4; PixArt-Sigma's own training left out what is wider than this
POLICIES = ("skip", "error")
_SHOWN_ROWS = 40
_READERS = 4


@dataclass(frozen=True)
class Record:
    """A picture and its caption. name: what tables and errors call it. caption: None when there is none.

    problem: what the source could not make out, such as a file that is missing. is_prior: see examples.Example.
    number: in the whole source, where this is a share of it. mask: a grey picture of what is to be learned, or None.
    others: further captions that the source has. captions: all that are to be encoded, where that is not the one.
    views: in how many views the picture is to be encoded, None for the plain one. repeats: how often it is shown in an
    epoch. weight: of its loss.
    """

    name: str
    picture: Picture | None
    caption: str | None
    control: Picture | None = None
    is_prior: bool = False
    problem: str | None = None
    number: int | None = None
    mask: Picture | None = None
    others: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    views: ViewVariety | None = None
    repeats: float = 1.0
    weight: float = 1.0


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

    records: tuple[Record, ...]
    report: str

    def __len__(self) -> int:
        return len(self.records)

    def __add__(self, other: "Dataset") -> "Dataset":
        return Dataset(self.records + other.records, f"{self.report}\n\n{other.report}")


@dataclass(frozen=True)
class _Seen:
    """What reading a record's picture gave: its content's digest and size, or the error."""

    digest: str = ""
    size_px: tuple[int, int] = (0, 0)
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
    records = [_settle(record, fallback_caption, is_prior) for record in records]
    seen = _read_all(records, progress)
    findings: list[Finding] = []
    kept, contents = [], {}
    for record, sight in zip(records, seen, strict=True):
        found = _judge(record, sight, smallest_px, contents)
        findings += found
        if not any(finding.fatal for finding in found):
            kept.append(record)
            contents.setdefault(sight.digest, record)
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
    return Dataset(tuple(kept), report)


def _settle(record: Record, fallback_caption: str, is_prior: bool) -> Record:
    given = (_mend_text((text or "").strip()) for text in (record.caption, fallback_caption))
    caption = next((text for text in given if not is_blank(text)), None)
    others = tuple(filter(lambda text: not is_blank(text), (_mend_text(text.strip()) for text in record.others)))
    settled = {"name": _mend_text(record.name), "caption": caption, "others": others}
    return replace(record, **settled, is_prior=record.is_prior or is_prior)


def _mend_text(text: str) -> str:
    """Text that can be written: halves of letters, as JSON and names of files may hold them, become a sign."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_all(records: Sequence[Record], progress: Callable | None) -> list[_Seen]:
    pool, seen = ThreadPoolExecutor(_READERS), []
    try:
        for sight in pool.map(_read, records):
            seen.append(sight)
            if progress is not None:
                progress(len(seen), len(records), None)
    finally:
        pool.shutdown(cancel_futures=True)
    return seen


def _read(record: Record) -> _Seen:
    """Decode the whole picture, since a cut file shows itself only so, and the control picture."""
    if record.problem or record.picture is None:
        return _Seen(error=record.problem or "no picture")
    whose = ""
    try:
        content = record.picture.content()
        decode_picture(record.picture, content)
        size_px = measure_picture(record.picture, content)
        for name, other in (("control picture: ", record.control), ("mask: ", record.mask)):
            whose = name
            if other is not None:
                decode_picture(other, other.content())
    except (OSError, ValueError) as error:
        return _Seen(error=f"{whose}{error}")
    return _Seen(digest(content), size_px)


def _judge(record: Record, sight: _Seen, smallest_px: int, contents: dict[str, Record]) -> list[Finding]:
    found = []

    def add(kind: str, detail: str, fatal: bool = True) -> None:
        found.append(Finding(kind, record.name, detail, fatal))

    if record.caption is None:
        add("no caption", "add a .txt file or a caption in the table")
    if sight.error:
        add("unreadable", sight.error)
        return found
    height, width = sight.size_px
    if min(height, width) < smallest_px:
        add("too small", f"{width} x {height} px, expected at least {smallest_px} on the shorter side")
    if max(height, width) > EXTREME_RATIO * min(height, width):
        add("too narrow", f"{width} x {height} px, expected sides of at most 1 to {EXTREME_RATIO:g}")
    twin = contents.get(sight.digest)
    if twin is not None:
        same = twin.caption == record.caption
        detail = f"the same picture as {twin.name}" + ("" if same else ", with another caption: kept")
        add("duplicate", detail, fatal=same)
    return found


def describe(kept: Sequence[Record], findings: Sequence[Finding]) -> str:
    """The table: how many are used, how many have which problem, and each of them by name."""
    names = {finding.name for finding in findings if finding.fatal}
    controls = sum(record.control is not None for record in kept)
    masks = sum(record.mask is not None for record in kept)
    prior = sum(record.is_prior for record in kept)
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
