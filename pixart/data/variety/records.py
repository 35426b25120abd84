"""How often records are shown, and in which variants: what a dataset is told between its check and its encoding."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...quoting import shorten
from ..pictures import PICTURE_SUFFIXES, FilePicture
from ..records import Dataset, Record
from ..storage.table import RecordTable
from .captions import CaptionVariety
from .masks import is_label, label_of
from .shares import check_repeats, named_folder, repeats_of_shares
from .views import MASK, ViewVariety


@dataclass(frozen=True)
class Variety:
    """What is made of each record. repeats: how often it is shown in an epoch, times what it has. weight: of its loss,
    likewise. captions, views: see there; None leaves them as they are.
    """

    captions: CaptionVariety | None = None
    views: ViewVariety | None = None
    repeats: float = 1.0
    weight: float = 1.0

    def __post_init__(self):
        check_repeats(self.repeats)
        check_repeats(self.weight, "weight")


def vary(dataset: Dataset, variety: Variety) -> Dataset:
    """The dataset with a variety, and a line for each part of it in its report."""
    records = RecordTable(_vary(record, variety) for record in dataset.records)
    return Dataset(records, "\n".join([dataset.report, *_describe(records, variety)]))


def with_mask_files(
    records: Iterable[Record],
    problem_of: Callable[[Path], str | None],
    find: Callable[[Path], FilePicture | None] | None = None,
) -> Iterator[Record]:
    """Records with their masks, without those that are masks themselves.

    problem_of: what is wrong with where a file lies. find: the mask of a picture; None: the file beside it, see
    masks.LABEL. Raises ValueError for pictures that are no files.
    """
    for record in records:
        if record.picture is None:
            yield record
            continue
        if not isinstance(record.picture, FilePicture):
            raise ValueError(
                f"No place for masks: got {shorten(record.name)}, which is no file of its own, expected pictures in "
                f"files. Unpack them, or take the masks from the alpha channels."
            )
        path, problem = record.picture.path, None
        if is_label(path):
            continue
        mask = find(path) if find else None
        if find is None and (label := label_of(path, sorted(PICTURE_SUFFIXES))):
            problem = problem_of(label)
            mask = None if problem else FilePicture(label)
        yield replace(record, mask=mask, problem=record.problem or (problem and f"mask: {problem}"))


def with_named_repeats(record: Record, root: Path) -> Record:
    """The record with what its folder's name says, such as 10_cat: the folder below the root, the root or its own."""
    if not isinstance(record.picture, FilePicture):
        return record
    path = record.picture.path
    inner = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()
    names = (*inner[:1], root.name, path.parent.name)
    named = next((found for name in names if (found := named_folder(name))), None)
    if named is None:
        return record
    return replace(record, repeats=record.repeats * named[0], caption=record.caption or named[1])


def _vary(record: Record, variety: Variety) -> Record:
    captions = record.captions
    if variety.captions is not None:
        captions = variety.captions.of(record.caption or "", record.others)
    return replace(
        record,
        captions=captions,
        views=record.views if variety.views is None else variety.views,
        repeats=record.repeats * variety.repeats,
        weight=record.weight * variety.weight,
    )


def _describe(records: Sequence[Record], variety: Variety) -> list[str]:
    count, lines = len(records), []
    if variety.captions is not None:
        total = sum(map(lambda record: len(record.captions), records))
        lines.append(
            f"captions: {total} are encoded, {total / count:.3g} a picture, such as {records[0].captions[-1]!r}"
        )
    if variety.views is not None and variety.views.variants > 1:
        lines.append(f"views: {variety.views.variants} of each picture are encoded")
    if variety.views is not None and variety.views.focus == MASK:
        without = sum(record.mask is None for record in records)
        lines += [f"{without} without a mask are cut in the middle"] if without else []
    repeats = sorted({record.repeats for record in records})
    if repeats != [1]:
        shown = sum(record.repeats for record in records)
        span = f"{repeats[0]:.3g}" if len(repeats) == 1 else f"{repeats[0]:.3g} to {repeats[-1]:.3g}"
        lines.append(f"repeats: each picture {span} times an epoch, {shown:.0f} in all")
    return lines


def join(first: Dataset, second: Dataset, share: float = 0.0) -> Dataset:
    """Two datasets as one. share: how many pictures of the second an epoch shows for one of the first, by repeats of
    either of at least what they are; 0 shows all as they are.
    """
    if not share:
        return first + second
    counts = [sum(record.repeats for record in each.records) for each in (first, second)]
    factors = repeats_of_shares(counts, [1.0, share])
    parts = (vary(each, Variety(repeats=factor)) for each, factor in zip((first, second), factors, strict=True))
    records = RecordTable(record for part in parts for record in part.records)
    told = f"shares: 1 to {share:g}, by repeats of {factors[0]:.3g} and {factors[1]:.3g}"
    return Dataset(records, "\n\n".join((first.report, second.report, told)))
