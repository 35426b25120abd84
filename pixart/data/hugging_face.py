"""Hugging Face datasets on disk: what save_to_disk wrote, or the .parquet files of the hub."""

from pathlib import Path

from ..files.documents import parse_json
from ..files.inside import check_folder, check_inside, is_plain_name
from ..files.regular import CONFIG_BYTES, check_mode, read_text
from ..quoting import shorten
from .records import wrong_table

SPLITS, STATE = "dataset_dict.json", "state.json"


def open_rows(path: Path):
    """The rows of what save_to_disk wrote or of .parquet files; those of the split train where there is one.

    Raises ModuleNotFoundError without datasets, ValueError for another content and for names or links that lead out
    of the folder.
    """
    try:
        from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
        from datasets.exceptions import DatasetGenerationError
    except ImportError as error:
        raise ModuleNotFoundError(
            "Package missing: got no 'datasets', expected it for a Hugging Face dataset on disk. Install it with: "
            "pip install datasets"
        ) from error
    files = parquet_files(path)
    try:
        if files:
            return Dataset.from_parquet([str(_checked(file, path)) for file in files])
        _check_saved(path)
        rows = load_from_disk(str(path))
    except (FileNotFoundError, KeyError, TypeError, ValueError, DatasetGenerationError) as error:
        got = f"another content ({shorten(error.__cause__ or error, 200)})"
        raise wrong_table(path, got, "one that save_to_disk wrote, or .parquet files") from error
    if isinstance(rows, DatasetDict):
        rows = rows["train"] if "train" in rows else concatenate_datasets(list(rows.values()))
    return rows.with_format(None)


def parquet_files(path: Path) -> list[Path]:
    """Those of a dataset in the form of the hub, in the folder or its folder data; of the split train if any is."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".parquet" else []
    files = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    return [file for file in files if file.name.startswith("train")] or files


def is_picture_column(feature) -> bool:
    """Whether a column holds pictures: the feature Image, or as other programs write it, bytes or {bytes, path}."""
    from datasets import Image

    inner = feature.get("bytes") if isinstance(feature, dict) else feature
    return isinstance(feature, Image) or getattr(inner, "dtype", None) in ("binary", "large_binary")


def _checked(file: Path, path: Path) -> Path:
    if file != path:
        check_inside(file, path)
    check_mode(file.stat().st_mode, file)
    return file


def _check_saved(path: Path) -> None:
    """Raises ValueError where the lists of a saved dataset name anything but files and folders within it.

    datasets joins the names to the folder as they are: with an absolute name, .. or an address it reads elsewhere.
    """
    if not path.is_dir():
        return
    check_folder(path)
    splits = _listed(path / SPLITS, "splits") if (path / SPLITS).is_file() else []
    for folder in (path, *(path / name for name in splits)):
        if (folder / STATE).is_file():
            _listed(folder / STATE, "_data_files", "filename")


def _listed(file: Path, entry: str, inner: str | None = None) -> list[str]:
    listed = parse_json(read_text(file, CONFIG_BYTES))[entry]
    names = [name[inner] for name in listed] if inner else list(listed)
    for name in names:
        if not is_plain_name(name):
            raise ValueError(f"the name {shorten(name)} in {file.name}, which leads out of the folder")
    return names
