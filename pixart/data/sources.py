"""Datasets as they lie on disk: folders, tables, PixArt's own layouts and Hugging Face's, read into records."""

import csv
import io
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..files.documents import TABLE_LIMIT, parse_json
from ..files.inside import check_inside, is_inside
from ..files.regular import MEGABYTE, TABLE_BYTES, read_bytes
from ..quoting import list_names, plain, shorten
from .archives import Sample, is_picture, read_samples, tar_files
from .hugging_face import is_picture_column, open_rows, parquet_files
from .pictures import PICTURE_SUFFIXES, FilePicture, RowPicture
from .records import Record, wrong_table
from .storage.table import RecordTable
from .variety.masks import ALPHA, FILES, MASKS, NONE, AlphaPicture
from .variety.records import with_mask_files, with_named_repeats

AUTO, FOLDER, CSV, JSONL, PIXART, SAM, HUGGING_FACE = "auto", "folder", "csv", "jsonl", "pixart json", "sam", "datasets"
TAR = "tar"
KINDS = (AUTO, FOLDER, CSV, JSONL, PIXART, SAM, HUGGING_FACE, TAR)
_COLUMN_LIMIT = 1000
_CSV_END = "\x1e"  # a row behind the last one: a quote that is never closed takes it in
_CAPTION_SUFFIXES = (".txt", ".caption", ".TXT")
CAPTION_BYTES = MEGABYTE  # a book's chapter; models read a few hundred words
# Column names in use, best first: MindOne's dir,text; Hugging Face's file_name,text; PixArt's path,prompt.
PICTURE_COLUMNS = ("dir", "file_name", "path", "image", "file", "filename", "picture")
CAPTION_COLUMNS = ("text", "prompt", "caption")
CONTROL_COLUMNS = ("control", "conditioning_image", "conditioning", "hint")


@dataclass(frozen=True)
class Columns:
    """Which columns hold picture, caption and control picture; empty: by their usual names, control optional."""

    picture: str = ""
    caption: str = ""
    control: str = ""


def read_dataset(
    path: str | os.PathLike,
    kind: str = AUTO,
    columns: Columns | None = None,
    *,
    control_folder: str | os.PathLike | None = None,
    confined: bool = False,
    shows_cells: bool = True,
    named_repeats: bool = False,
    masks: str = NONE,
    mask_folder: str | os.PathLike | None = None,
) -> RecordTable:
    """The records of a dataset; kind: one of KINDS. Pictures are named, not read.

    control_folder: holds control pictures under the names of the pictures, with any picture suffix.
    confined: only what lies below the dataset's own folder counts, wherever links lead; what else a table names or a
    link leads to becomes a problem in the check. Captions and tables never count when their own link leads out.
    shows_cells: False for a file whose content must not be shown: records are named by their row, and neither errors
    nor problems show a cell or the name of a column.
    named_repeats: folders named as kohya's trainers have them say how often their pictures are shown, such as 10_cat,
    and what they show where a picture has no caption. masks: of MASKS: each picture's own alpha channel, or a picture
    of the same name with -masklabel behind it, or in the mask_folder.
    Raises FileNotFoundError when there is nothing at path, ValueError for another kind, missing columns, and a dataset
    without a picture.
    """
    path = Path(path)
    for what, given, allowed in (("dataset kind", kind, KINDS), ("source of masks", masks, MASKS)):
        if given not in allowed:
            raise ValueError(
                f"Unknown {what}: got {shorten(given)}, expected one of {', '.join(allowed)}. Choose one of them."
            )
    if not path.exists():
        raise FileNotFoundError(
            f"Dataset not found: got {shorten(str(path), 300)}, expected a folder or file. Correct the path."
        )
    if not path.is_dir() and not path.is_file():
        raise ValueError(
            f"Not a dataset: got a pipe or device named {shorten(path.name)}, expected a folder or a regular file. "
            f"Choose another path."
        )
    kind = detect_kind(path) if kind == AUTO else kind
    place = _Place(path if path.is_dir() else path.parent, confined, shows_cells)
    control = None if control_folder is None else _Stems(Path(control_folder))
    records = RecordTable(_READERS[kind](path, place, columns or Columns(), control))
    if mask_folder is not None:
        stems = _Stems(Path(mask_folder), "Mask folder")
        records = RecordTable(with_mask_files(records, place.problem_of, lambda path: stems.find_of(path, place.root)))
    elif masks == FILES:
        records = RecordTable(with_mask_files(records, place.problem_of))
    elif masks == ALPHA:
        records = RecordTable(replace(each, mask=each.picture and AlphaPicture(each.picture)) for each in records)
    if named_repeats:
        records = RecordTable(with_named_repeats(each, path) for each in records)
    if not records:
        raise ValueError(
            f"Empty dataset: got no pictures in {shorten(str(path), 300)}, expected {_EXPECTED[kind]}. Put some there, "
            f"or correct the path or the kind."
        )
    return records


def detect_kind(path: Path) -> str:
    """The kind of what lies at path: by the suffix of a file, by the names in a folder."""
    if path.is_file():
        kinds = {".csv": CSV, ".tsv": CSV, ".jsonl": JSONL, ".json": PIXART, ".parquet": HUGGING_FACE, ".tar": TAR}
        if path.suffix.lower() not in kinds:
            raise ValueError(
                f"Unknown dataset file: got {shorten(path.name)}, expected {', '.join(kinds)}. Choose such a file, or "
                f"a folder of pictures."
            )
        return kinds[path.suffix.lower()]
    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))
    if saved or parquet_files(path):
        return HUGGING_FACE
    if _find_json(path):
        return PIXART
    if (path / "images").is_dir() and (path / "captions").is_dir():
        return SAM
    if tar_files(path):
        return TAR
    tables = _tables_in(path)
    pictures = {entry.stem for entry in path.iterdir() if entry.suffix.lower() in PICTURE_SUFFIXES}
    captions = {entry.stem for entry in path.iterdir() if entry.suffix in _CAPTION_SUFFIXES}
    if pictures & captions:  # then a table is about something else
        return FOLDER
    if len(tables) > 1:
        raise _several_tables(tables, path, "table")
    return (CSV if tables[0].suffix.lower() != ".jsonl" else JSONL) if tables else FOLDER


def _several_tables(tables: list[Path], path: Path, wanted: str) -> ValueError:
    return ValueError(
        f"Which table is meant: got {list_names([table.name for table in tables]) or 'none'} in {shorten(path.name)}, "
        f"expected one {wanted}. Enter its path, or choose the kind folder to pass them over."
    )


def _tables_in(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in (".csv", ".tsv", ".jsonl"))


def _find_json(folder: Path) -> Path | None:
    places = (folder / inner / "data_info.json" for inner in ("", "partition", "partition_filter"))
    return next((place for place in places if place.is_file()), None)


class _Place:
    """Finds the pictures that a table names, as Windows or others write paths."""

    def __init__(self, root: Path, confined: bool, shows_cells: bool = True):
        self.root, self.confined, self.shows_cells = root, confined, shows_cells

    def told(self, cell: str) -> str:
        """A cell as problems show it."""
        return shorten(cell) if self.shows_cells else "the cell's text"

    def check(self, path: Path) -> None:
        """Raises ValueError for a text whose own link leads out of its folder, and of a confined dataset any link."""
        if self.confined or not is_inside(path, path.parent):  # a linked folder is the owner's own doing
            check_inside(path, self.root)

    def problem_of(self, picture: Path) -> str | None:
        """What is wrong with where a picture that was found in the dataset lies."""
        leads_out = self.confined and not is_inside(picture, self.root)
        return "its link leads out of the dataset's folder" if leads_out else None

    def find(self, name: str, *bases: Path) -> tuple[Path | None, str | None]:
        """(the file, None) or (None, what is wrong); bases are searched after the root, and are part of the dataset."""
        if not name:
            return None, "the table names no picture"
        slashes = (name, PureWindowsPath(name).as_posix())
        spellings = dict.fromkeys(spelling for each in slashes for spelling in (each, _composed(each), _apart(each)))
        places = (self.root, *bases)
        paths = [Path(os.path.normpath(place / spelling)) for place in places for spelling in spellings]
        if self.confined:
            roots = [os.path.normpath(place) for place in places]
            paths = [path for path in paths if any(map(path.is_relative_to, roots))]
            paths = [path for path in paths if any(is_inside(path, root) for root in roots)]
            if not paths:
                return None, f"{self.told(name)} leads out of the dataset's folder"
        found = next(filter(os.path.isfile, paths), None)  # a Path's own is_file raises for a name that is too long
        return found, None if found else f"no such file: {self.told(name)}"


class _Stems:
    """The pictures of a folder by their names below it, without suffix."""

    def __init__(self, folder: Path, what: str = "Control folder"):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{what} not found: got {shorten(str(folder), 300)}, expected a folder of pictures. Correct "
                f"the path, or leave it empty."
            )
        self.folder = folder
        self.paths = {_stem(path.relative_to(folder)): path for path in _walk_pictures(folder)}

    def find(self, name: Path) -> FilePicture | None:
        path = self.paths.get(_stem(name)) or self.paths.get(_composed(name.stem))
        return None if path is None else FilePicture(path)

    def find_of(self, picture: Path, root: Path) -> FilePicture | None:
        """The one of a picture somewhere, by its path below a root or its name alone."""
        inner = picture.relative_to(root) if picture.is_relative_to(root) else picture
        return self.find(inner) or self.find(Path(picture.name))


def _stem(name: Path) -> str:
    return _composed(os.path.splitext(name.as_posix())[0])


# Unicode's two ways to write an accent: within its letter, and behind it as macOS does in names of files.
_composed, _apart = (partial(unicodedata.normalize, form) for form in ("NFC", "NFD"))


def walk_files(folder: Path) -> Iterator[Path]:
    """The files below a folder in order, but for hidden ones; links are followed, to each folder once."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(root)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _walk_pictures(folder: Path) -> Iterator[Path]:
    return (path for path in walk_files(folder) if path.suffix.lower() in PICTURE_SUFFIXES)


def read_text(path: Path, most_bytes: int = TABLE_BYTES) -> str:
    """A text file in UTF-8 or UTF-16 with a mark, else in Windows' western code page, whose every byte is a letter.

    Raises OSError, and ValueError for what is no regular file or too large.
    """
    data = read_bytes(path, most_bytes)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _read_caption(text: Path | None, place: _Place) -> tuple[str | None, str | None]:
    """(the caption of a file or None, what is wrong with it)."""
    if text is None:
        return None, None
    try:
        place.check(text)
        return read_text(text, CAPTION_BYTES), None
    except (OSError, ValueError) as error:
        return None, f"caption: {shorten(error, 200)}"


def _read_folder(path: Path, place: _Place, columns: Columns, control: _Stems | None) -> Iterator[Record]:
    inner = path if path.is_dir() else path.parent
    hints = control and os.path.abspath(control.folder)
    for picture in _walk_pictures(inner):
        if hints and Path(os.path.abspath(picture)).is_relative_to(hints):
            continue
        name = picture.relative_to(inner)
        texts = (picture.with_suffix(suffix) for suffix in _CAPTION_SUFFIXES)
        caption, problem = _read_caption(next((text for text in texts if os.path.lexists(text)), None), place)
        hint = control.find(name) if control else None
        problem = problem or place.problem_of(picture)
        yield Record(name.as_posix(), None if problem else FilePicture(picture), caption, hint, problem=problem)


def _read_csv(path: Path, place: _Place, columns: Columns, control: _Stems | None) -> Iterator[Record]:
    table = _only_table(path, (".csv", ".tsv"), place)
    text = read_text(table).replace("\r\n", "\n").replace("\r", "\n")
    separator = "\t" if table.suffix.lower() == ".tsv" else _separator(text)
    reader = csv.DictReader(chain(io.StringIO(text), [_CSV_END]), delimiter=separator)
    try:
        if len(reader.fieldnames or ()) > _COLUMN_LIMIT:  # each row would hold as many
            raise wrong_table(table, f"{len(reader.fieldnames)} columns", f"at most {_COLUMN_LIMIT}")
        rows = list(reader)
    except csv.Error as error:
        got = f"line {reader.line_num + 1} that is no table's ({error})"
        raise wrong_table(table, got, "columns, and texts with separators in quotes") from error
    if rows and _CSV_END not in rows.pop().values():
        raise wrong_table(table, "a quote that is never closed", 'two around a text, and "" for one within it')
    yield from _read_rows(rows, table, place, columns, control)


def _separator(text: str) -> str:
    heading = text.split("\n", 1)[0]
    return max(",;\t", key=heading.count)


def _read_jsonl(path: Path, place: _Place, columns: Columns, control: _Stems | None) -> Iterator[Record]:
    table = _only_table(path, (".jsonl",), place)
    lines = [(number, line) for number, line in enumerate(read_text(table).split("\n"), 1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            rows.append(parse_json(line))
        except ValueError as error:
            raise wrong_table(
                table, f"line {number} that is no JSON ({plain(str(error))})", "one object a line"
            ) from error
    yield from _read_rows(rows, table, place, columns, control)


def _read_pixart(path: Path, place: _Place, columns: Columns, control: _Stems | None) -> Iterator[Record]:
    """Source: PixArt-alpha, diffusion/data/datasets/InternalData.py: a list of {path, prompt, height, width, ratio}."""
    table = path if path.is_file() else _find_json(path)
    if table is None:
        raise FileNotFoundError(
            f"Dataset not found: got {shorten(str(path), 300)} without data_info.json, expected one. Choose a file."
        )
    if table != path:
        place.check(table)
    text = read_text(table)
    try:
        rows = parse_json(text, TABLE_LIMIT)
    except ValueError as error:
        raise wrong_table(table, f"no JSON ({plain(str(error))})", "a list of objects") from error
    root = table.parent.parent if table.parent.name.startswith("partition") else table.parent
    place = _Place(root, place.confined, place.shows_cells)
    twin = Path(str(root).replace("InternData", "InternImgs"))
    if place.confined and twin.parent != root.parent:  # a folder above the dataset has that name
        twin = root
    yield from _read_rows(rows, table, place, columns, control, twin, root / "images", table.parent)


def _read_rows(rows, table: Path, place: _Place, columns: Columns, control, *bases: Path) -> Iterator[Record]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise wrong_table(table, "other content", "a list of rows with named columns")
    found = list(dict.fromkeys(name for row in rows[:100] for name in row if name))
    shown = found if place.shows_cells else None
    picture = _column(columns.picture, PICTURE_COLUMNS, found, "picture", table, shown)
    caption = _column(columns.caption, CAPTION_COLUMNS, found, "caption", table, shown)
    hint = _column(columns.control, CONTROL_COLUMNS, found, "control", table, shown) if rows else None
    for number, row in enumerate(rows, 1):
        name = str(row.get(picture) or "").strip()
        path, problem = place.find(name, *bases)
        hint_picture, problem = _find_control(row, hint, control, name, place, bases, problem)
        if None in row:  # where the reader of tables puts them
            problem = f"{len(row[None])} more cells than the table has columns; put texts with separators in quotes"
        yield Record(
            (name if place.shows_cells else path and path.name) or f"row {number}",
            None if path is None else FilePicture(path),
            _caption_of(row.get(caption)),
            hint_picture,
            problem=problem,
            others=_others_of(row.get(caption)),
        )


def _others_of(cell) -> tuple[str, ...]:
    """The further texts of a table's cell that holds a list."""
    return tuple(map(str, cell[1:])) if isinstance(cell, list | tuple) else ()


def _caption_of(cell) -> str | None:
    """The text of a table's cell; of several, as COCO has them, the first."""
    if isinstance(cell, list | tuple):
        cell = cell[0] if cell else None
    return None if cell is None else str(cell)


def _find_control(row, column, control: _Stems | None, name: str, place: _Place, bases, problem):
    """(the control picture or None, the problem so far or the control picture's)."""
    if control is not None:
        return control.find(Path(PureWindowsPath(name).as_posix())), problem
    if column is None or not row.get(column):
        return None, problem
    path, missing = place.find(str(row[column]).strip(), *bases)
    return (None if path is None else FilePicture(path)), problem or (missing and f"control picture: {missing}")


def _column(wanted: str, usual: tuple[str, ...], found: list[str], what: str, table: Path, shown) -> str | None:
    """The name of a column. shown: the names in the error, None for none."""
    name = wanted or next((name for known in usual for name in found if name.strip().lower() == known), None)
    if name in found or (name is None and what == "control") or not found:
        return name
    raise ValueError(
        f"No {what} column in {table.name}: got {_listed(found, shown)}, expected "
        f"{shorten(wanted) if wanted else ' or '.join(usual)}. Enter the name of the column with the {what}."
    )


def _listed(found: list[str], shown: list[str] | None) -> str:
    if shown is None:
        return f"{len(found)} columns without it"
    return f"the columns {', '.join(shorten(name, 40) for name in shown[:20])}"


def _read_sam(path: Path, place: _Place, columns: Columns, control: _Stems | None) -> Iterator[Record]:
    """images, captions, partition/*.txt with one stem a line. Source: PixArt-alpha, diffusion/data/datasets/SA.py."""
    images, captions = path / "images", path / "captions"
    if not images.is_dir():
        raise FileNotFoundError(
            f"Dataset not found: got {shorten(str(path), 300)} without a folder images, expected images, captions and "
            f"partition. Choose the folder above them."
        )
    pictures = {_stem(picture.relative_to(images)): picture for picture in _walk_pictures(images)}
    texts = {_stem(text.relative_to(captions)): text for text in walk_files(captions) if text.suffix == ".txt"}
    parts = sorted((path / "partition").glob("*.txt")) if (path / "partition").is_dir() else []
    for part in parts:
        place.check(part)
    lines = [line.strip() for part in parts for line in read_text(part).splitlines() if line.strip()]
    is_file = [Path(line).suffix.lower() in PICTURE_SUFFIXES for line in lines]
    listed = [_stem(Path(line)) if named else _composed(line) for line, named in zip(lines, is_file, strict=True)]
    for stem in listed or pictures:
        picture, (caption, problem) = pictures.get(stem), _read_caption(texts.get(stem), place)
        problem = (problem or place.problem_of(picture)) if picture else f"no picture images/{shorten(stem)[1:-1]}"
        yield Record(
            stem,
            None if problem else FilePicture(picture),
            caption,
            control.find(Path(stem)) if control else None,
            problem=problem,
        )


def _read_hugging_face(path: Path, place: _Place, columns: Columns, control: _Stems | None) -> Iterator[Record]:
    rows = open_rows(path)
    from datasets import Image

    found = rows.column_names
    shown = found if place.shows_cells else None
    picture = _column(columns.picture, ("image", *PICTURE_COLUMNS), found, "picture", path, shown)
    caption = _column(columns.caption, CAPTION_COLUMNS, found, "caption", path, shown)
    hint = _column(columns.control, CONTROL_COLUMNS, found, "control", path, shown)
    for name in filter(None, (picture, hint)):
        if not is_picture_column(rows.features[name]):
            raise wrong_table(path, f"the type {rows.features[name]} in {name}", "pictures (the feature Image)")
        rows = rows.cast_column(name, Image(decode=False))
    for index, text in enumerate(rows[caption]):
        hint_picture = RowPicture(rows, index, hint, place.root, place.confined) if hint else None
        own = RowPicture(rows, index, picture, place.root, place.confined)
        yield Record(f"row {index + 1}", own, _caption_of(text), hint_picture, others=_others_of(text))


def _read_tar(path: Path, place: _Place, columns: Columns, control: _Stems | None) -> Iterator[Record]:
    """Captions that are not in the tar files are looked for in a folder captions, as SA-1B's are."""
    captions = place.root / "captions"
    texts = {text.stem: text for text in walk_files(captions) if text.suffix == ".txt"} if captions.is_dir() else {}
    for archive in tar_files(path):
        place.check(archive)
        for sample in read_samples(archive):
            yield _record_of(sample, texts, place, columns, control)


def _record_of(sample: Sample, texts: dict[str, Path], place: _Place, columns: Columns, control) -> Record:
    usual = [suffix for suffix in sample.files if is_picture(suffix) and suffix.split(".")[0] in CONTROL_COLUMNS]
    hints = [columns.control] if columns.control in sample.files else usual
    picture, problem = sample.picture(columns.picture, hints)
    hint = sample.picture(hints[0], ())[0] if hints else control and control.find(Path(sample.name))
    try:
        found = sample.caption(columns.caption, CAPTION_COLUMNS)
    except (OSError, ValueError) as error:
        found, problem = None, problem or f"caption: {shorten(error, 200)}"
    caption = _caption_of(found)
    if caption is None and problem is None:
        caption, problem = _read_caption(texts.get(PurePosixPath(sample.name).name), place)
    name = f"{sample.archive.name}/{sample.name}"
    return Record(name, None if problem else picture, caption, hint, problem=problem, others=_others_of(found))


def _only_table(path: Path, suffixes: tuple[str, ...], place: _Place) -> Path:
    if path.is_file():
        return path
    tables = [table for table in _tables_in(path) if table.suffix.lower() in suffixes]
    if len(tables) != 1:
        raise _several_tables(tables, path, f"{suffixes[0]} file")
    place.check(tables[0])
    return tables[0]


_EXPECTED = {
    FOLDER: f"files such as {', '.join(sorted(PICTURE_SUFFIXES)[:6])} in the folder or below it",
    CSV: "a row for each",
    JSONL: "a line for each",
    PIXART: "an entry for each in the list",
    SAM: "some in its folder images",
    HUGGING_FACE: "a row for each",
    TAR: "files such as 1.jpg and 1.txt in its tar files",
}
_READERS = {
    FOLDER: _read_folder,
    CSV: _read_csv,
    JSONL: _read_jsonl,
    PIXART: _read_pixart,
    SAM: _read_sam,
    HUGGING_FACE: _read_hugging_face,
    TAR: _read_tar,
}
