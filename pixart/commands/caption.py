"""`python -m pixart caption`: captions for pictures, written where a dataset is read from."""

import argparse
import csv
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..data import sources
from ..data.pictures import FilePicture, decode_picture, measure_picture
from ..data.records import Record
from ..encoders.captioner import (
    CAPTION_MARK,
    DESCRIBE,
    DESCRIBE_CAPTION,
    Captioner,
    CaptionSettings,
    fill_prompt,
    load_captioner,
)
from ..files.atomic import write_atomically
from ..files.documents import parse_json
from ..quoting import shorten
from ..weights.saving import DTYPES
from .console import add_device, make_parser, own_device, process_rank

log = logging.getLogger(__name__)

TABLES = (".csv", ".json", ".jsonl")
DESCRIPTION = """Describe pictures with a vision-language model from a local folder. What has a caption is left out, and
an interrupted run goes on where it was. With `accelerate launch` (or RANK and WORLD_SIZE set) each process captions its
share, and the one that finishes last writes the table."""
EXAMPLES = """examples:
  python -m pixart caption pictures/ --model llava-1.5-7b-hf/
  python -m pixart caption pictures/ --model llava-1.5-7b-hf/ --output pictures/captions.csv
  python -m pixart caption short.csv --model llava-1.5-7b-hf/ --refine --output dense.json"""


def parse() -> argparse.ArgumentParser:
    usual = CaptionSettings()
    parser = make_parser("caption", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add("dataset", type=Path, help="folder of pictures, or a table that names them")
    add("--model", type=Path, required=True, help="folder of LLaVA or another image-text-to-text model")
    add("--output", type=Path, help=f"folder of .txt files, or a table ({', '.join(TABLES)}); default: beside pictures")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help=f"what to ask; {{}} stands for the short caption (default: {DESCRIBE})")
    prompts.add_argument("--refine", action="store_true", help=f"ask: {DESCRIBE_CAPTION}")
    add("--kind", choices=sources.KINDS, default=sources.AUTO, help="of the dataset (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="pictures at once (default: %(default)s)")
    add("--max-tokens", type=int, default=usual.max_tokens, help="of a caption (default: %(default)s)")
    add("--temperature", type=float, default=usual.temperature, help="0 draws nothing (default: %(default)s)")
    add("--seed", type=int, default=usual.seed, help="default: %(default)s")
    add("--force", action="store_true", help="caption again what has a caption")
    add_device(parser)
    return parser


def main(options: argparse.Namespace) -> None:
    """Caption this process's share. Raises ValueError and OSError for bad input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.batch_size < 1:
        raise ValueError(f"Batch size out of range: got {options.batch_size}, expected at least 1. Enter 1 or more.")
    settings = CaptionSettings(options.max_tokens, options.temperature, options.seed)
    prompt = DESCRIBE_CAPTION if options.refine else options.prompt or DESCRIBE
    rank, world_size = process_rank()
    refines = CAPTION_MARK in prompt
    if refines and options.output is None:
        raise ValueError(
            "Captions would be lost: got a prompt with the short caption and no output, expected another place for "
            "the long ones. Name it with --output."
        )
    records = read_records(options.dataset, options.kind, options.output)
    output = make_output(options.dataset, options.output, rank)
    output.check(records)
    # Shared out before it is known what is done, which is another thing for each process when it comes to look.
    share = wanted_records(records[rank::world_size], output, refines, options.force)
    log.info("%d pictures, %d to caption here", len(records), len(share))
    if options.force:
        output.forget()
    if share:
        captioner = load_captioner(options.model, DTYPES[options.dtype], own_device(options.device))
        _caption(captioner, share, prompt, settings, options.batch_size, output)
    if output.finish(records, redo=refines or options.force):
        log.info("Captions are in %s", output.path)


def read_records(dataset: Path, kind: str, output: Path | None) -> list[Record]:
    """The dataset as it was before an earlier run wrote its output into it.

    Raises ValueError when the output is the dataset's own table.
    """
    if output is None or not output.is_file():
        return sources.read_dataset(dataset, kind)
    if dataset.is_file() and output.samefile(dataset):
        raise ValueError(
            f"Table would be overwritten: got {shorten(str(output), 300)} as dataset and output, expected two. Name "
            f"another --output."
        )
    if kind == sources.AUTO and dataset.is_dir() and output.parent.samefile(dataset):
        tables = [path for path in sorted(dataset.iterdir()) if path.suffix.lower() in (".csv", ".tsv", ".jsonl")]
        others = [path for path in tables if not path.samefile(output)]
        if len(others) == 1 and not any(dataset.glob("*.txt")):
            return sources.read_dataset(others[0])
        kind = sources.FOLDER
    return sources.read_dataset(dataset, kind)


def wanted_records(records: Sequence[Record], output: "TextFiles | Table", refines: bool, force: bool) -> list[Record]:
    """The pictures to caption: those without a caption here or in the output; all that the output lacks, to refine."""
    there = set() if force else output.names(records)
    return [
        record
        for record in records
        if record.picture is not None
        and record.name not in there
        and (refines or force or not (record.caption or "").strip())
    ]


def _caption(captioner: Captioner, records, prompt: str, settings: CaptionSettings, batch_size: int, output) -> None:
    from tqdm import tqdm

    failed = 0
    with tqdm(total=len(records), unit="picture") as bar:
        for start in range(0, len(records), batch_size):
            batch = records[start : start + batch_size]
            opened = list(_open(batch))
            unread = [record for record in batch if all(record is not each for each, _ in opened)]
            output.add([(record, "") for record in unread])
            failed += len(unread)
            if opened:
                pictures = [picture for _, picture in opened]
                prompts = [fill_prompt(prompt, record.caption) for record, _ in opened]
                captions = captioner(pictures, prompts, replace(settings, seed=settings.seed + start))
                output.add([(record, text) for (record, _), text in zip(opened, captions, strict=True)])
            bar.update(len(batch))
    if failed:
        log.warning("%d pictures could not be read and have no caption", failed)


def _open(records: Sequence[Record]) -> Iterator[tuple]:
    for record in records:
        try:
            picture = decode_picture(record.picture, record.picture.content())
            yield record, picture.convert("RGB")
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read: %s", record.name, error)


def make_output(dataset: Path, output: Path | None, rank: int = 0) -> "TextFiles | Table":
    """Where captions go: a table by its suffix, else .txt files in a folder, else beside their pictures."""
    if output is not None and output.suffix.lower() in TABLES:
        return Table(output, rank)
    if output is not None and (output.suffix or output.is_file()) and not output.is_dir():
        raise ValueError(
            f"Unknown output: got {shorten(output.name)}, expected a folder or one of {', '.join(TABLES)}. Correct "
            f"--output."
        )
    return TextFiles(output, dataset if dataset.is_dir() else dataset.parent)


@dataclass(frozen=True)
class TextFiles:
    """One .txt for each picture: in a folder under the picture's name below the dataset, or beside it when None."""

    folder: Path | None
    dataset: Path

    @property
    def path(self) -> Path:
        return self.folder or self.dataset

    def place(self, record: Record) -> Path:
        picture = record.picture.path
        if self.folder is None:
            return picture.with_suffix(".txt")
        base = self.dataset / "images" if (self.dataset / "images") in picture.parents else self.dataset
        inner = picture.relative_to(base) if picture.is_relative_to(base) else Path(picture.name)
        return self.folder / inner.with_suffix(".txt")

    def check(self, records: Sequence[Record]) -> None:
        """Raises ValueError for pictures that are no files, and for two of one name."""
        _check_files(records)
        places: dict[Path, str] = {}
        for record in filter(lambda each: each.picture, records):
            other = places.setdefault(self.place(record), record.name)
            if other != record.name:
                raise ValueError(
                    f"Two captions in one file: got {shorten(other)} and {shorten(record.name)}, expected names that "
                    f"differ before the suffix. Rename one, or choose a table as output."
                )

    def names(self, records: Sequence[Record]) -> set[str]:
        places = ((record.name, self.place(record)) for record in records if record.picture)
        return {name for name, place in places if place.is_file() and place.stat().st_size}

    def add(self, captions: Sequence[tuple[Record, str]]) -> None:
        for record, text in filter(lambda each: each[1], captions):
            content = text.encode("utf-8")
            write_atomically(self.place(record), lambda file, content=content: file.write_bytes(content))

    def forget(self) -> None:
        """Old captions stay until their new ones are written."""

    def finish(self, records: Sequence[Record], redo: bool) -> bool:
        return True


class Table:
    """A table of all pictures. As they come, captions stand in a journal for each process; the last one writes it."""

    def __init__(self, path: Path, rank: int = 0):
        self.path, self.rank = path, rank
        self.journal = self._journal(rank)

    def _journal(self, rank) -> Path:
        return self.path.with_name(f".{self.path.name}.part{rank}")  # no name that a table of a dataset has

    def check(self, records: Sequence[Record]) -> None:
        _check_files(records)

    def names(self, records: Sequence[Record]) -> set[str]:
        captions = self._read()
        return {record.name for record in records if record.picture and captions.get(self._key(record))}

    def add(self, captions: Sequence[tuple[Record, str]]) -> None:
        """Keep captions; an empty one says that there can be none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps([self._key(record), text]) for record, text in captions]
        with self.journal.open("a", encoding="utf-8") as file:
            file.write("".join(f"\n{line}" for line in lines))  # a line that was cut off does not spoil the next
            file.flush()
            os.fsync(file.fileno())

    def forget(self) -> None:
        """Removes the table, and this process's journal of an earlier run."""
        self.path.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)

    def finish(self, records: Sequence[Record], redo: bool) -> bool:
        """Write the table of all that has a caption, when every process is done. Returns whether it is written.

        redo: the dataset's own captions do not count.
        """
        journals = list(self.path.parent.glob(f".{self.path.name}.part*"))
        captions = self._read()
        rows = [
            (record, captions.get(self._key(record), None if redo else record.caption or None))
            for record in records
            if record.picture
        ]
        missing = [record.name for record, text in rows if text is None]
        if process_rank()[1] > 1 and missing:
            log.info("%d pictures have no caption yet; other processes may be at work on them.", len(missing))
            return False
        content = self._format([(record, text) for record, text in rows if text])
        write_atomically(self.path, lambda file: file.write_bytes(content))
        for journal in journals:
            journal.unlink(missing_ok=True)
        return True

    def _key(self, record: Record) -> str:
        """The picture as the table names it: below the table's folder where it lies there."""
        picture, folder = (Path(os.path.abspath(path)) for path in (record.picture.path, self.path.parent))
        return (picture.relative_to(folder) if picture.is_relative_to(folder) else picture).as_posix()

    def _read(self) -> dict[str, str]:
        """The captions that are there by their pictures: of the table, then of the journals."""
        captions = {}
        if self.path.is_file():
            table = sources.read_dataset(self.path)
            captions = {self._key(record): record.caption for record in table if record.picture and record.caption}
        for journal in sorted(self.path.parent.glob(f".{self.path.name}.part*")):
            for line in journal.read_text(encoding="utf-8").split("\n"):
                try:
                    key, text = parse_json(line)
                except (ValueError, TypeError):  # cut off by a crash
                    continue
                captions[key] = text
        return captions

    def _format(self, rows: Sequence[tuple[Record, str]]) -> bytes:
        suffix = self.path.suffix.lower()
        if suffix == ".csv":
            buffer = io.StringIO(newline="")
            csv.writer(buffer).writerows([("dir", "text"), *((self._key(record), text) for record, text in rows)])
            return buffer.getvalue().encode("utf-8")
        if suffix == ".jsonl":
            lines = (json.dumps({"file_name": self._key(r), "text": text}, ensure_ascii=False) for r, text in rows)
            return "".join(f"{line}\n" for line in lines).encode("utf-8")
        content = [{"path": self._key(record), "prompt": text, **_size(record)} for record, text in rows]
        return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8")


def _size(record: Record) -> dict:
    """What PixArt's data_info.json says of a picture beside its caption."""
    height, width = measure_picture(record.picture, record.picture.content())
    return {"height": height, "width": width, "ratio": height / width}


def _check_files(records: Sequence[Record]) -> None:
    strange = next(
        (record for record in records if record.picture and not isinstance(record.picture, FilePicture)), None
    )
    if strange:
        raise ValueError(
            f"Pictures are no files: got {shorten(strange.name)} in a dataset of another kind, expected a folder or a "
            f"table that names files. Save the pictures as files first."
        )
