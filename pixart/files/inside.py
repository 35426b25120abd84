"""Keeps what a folder names inside that folder: names without paths, and links that stay.

A link may lead to a file below the folder, or to a blob of Hugging Face's cache, `models--*/blobs/<hash>`, as the
cache's snapshots and older downloads have them: it is named after its content, so that nobody can point to one
whose content he does not know. Any other link that leaves the folder is refused by name.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..quoting import shorten
from .regular import CONFIG_BYTES, MEGABYTE, check_mode, too_large

MOST_FILES = 100_000
TOKENIZER_BYTES = 128 * MEGABYTE  # the largest vocabularies in use have a quarter of it
# What other libraries read whole and parse; weights are bounded by what they hold.
_PARSED = {".json": TOKENIZER_BYTES, ".jinja": CONFIG_BYTES, ".txt": TOKENIZER_BYTES, ".model": TOKENIZER_BYTES}
_BLOB = re.compile(r"(models|datasets|spaces)--[^/\\]+[/\\]blobs[/\\]([0-9a-f]{40}|[0-9a-f]{64})")


def is_plain_name(name: object) -> bool:
    """Whether a value is the name of an entry of a folder on every system, and not a path or an address."""
    return isinstance(name, str) and bool(name.strip(". ")) and re.search(r"[/\\:\x00]", name) is None


def is_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether a path leads to something below a folder, or to a blob of Hugging Face's cache, all links followed."""
    real = os.path.realpath(path)
    if Path(real).is_relative_to(os.path.realpath(folder)):
        return True
    return _BLOB.fullmatch(os.path.join(*Path(real).parts[-3:])) is not None


def check_inside(path: Path, folder: Path) -> Path:
    """The path as it is. Raises ValueError when it leads out of the folder, with its name but not where it leads."""
    if not is_inside(path, folder):
        raise ValueError(
            f"A link leads out of its folder: got {shorten(path.name)} in {shorten(Path(folder).name)}, expected a "
            f"file within it. Put the file itself there, or link the whole folder."
        )
    return path


def check_folder(folder: Path) -> None:
    """Check a whole folder that another library is going to read; hidden folders are passed over.

    Raises ValueError for a link that leads out, for what is no regular file, and for a configuration or vocabulary
    beyond its limit; FileNotFoundError for a link to nothing.
    """
    for path in _walk(folder):
        check_file(path, folder)


def check_file(path: Path, folder: Path) -> None:
    """Check one file in a folder, as `check_folder` does for all."""
    check_inside(path, folder)
    try:
        status = path.stat()
    except OSError as error:
        raise FileNotFoundError(
            f"File not found: got the link {shorten(path.name)} to nothing, expected a file. Download it again."
        ) from error
    check_mode(status.st_mode, path)
    limit = _PARSED.get(path.suffix.lower())
    if limit is not None and status.st_size > limit:
        raise too_large(path, status.st_size, limit)


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder but folders; links to folders are among it when they lead out."""
    count = 0
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in links]
        links = [name for name in links if not is_inside(os.path.join(root, name), folder)]
        for name in [*names, *links]:
            count += 1
            if count > MOST_FILES:
                raise ValueError(
                    f"Too many files: got more than {MOST_FILES} in {shorten(Path(folder).name)}, expected the folder "
                    f"of one model or data set. Choose another folder."
                )
            yield Path(root, name)
