"""Files and folders that appear complete or not at all."""

import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..quoting import shorten


def dump(content: dict, path: Path) -> None:
    """torch.save, by a file of Python's, which alone says what is wrong when the disk is full."""
    with path.open("wb") as file:
        torch.save(content, file)


PRIVATE = 0o600  # the mode of files that nobody but the account that writes them may read


def write_atomically(path: Path, write: Callable[[Path], None], mode: int | None = None) -> None:
    """Let `write` fill a temporary file next to `path`, then put it in place in one step; on failure leave nothing.

    mode: of the file, from its first byte on; None is the system's usual one.
    Raises OSError also for what safetensors and torch raise in its place, such as when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        with open(temporary, "xb", opener=None if mode is None else _opener(mode)) as file:
            mode = os.fstat(file.fileno()).st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes its files readable to their owner alone
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # an interrupted write leaves nothing behind either
        temporary.unlink(missing_ok=True)
        number = _system_error(error)
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _opener(mode: int) -> Callable[[str, int], int]:
    return lambda path, flags: os.open(path, flags, mode)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file that nobody but the account that writes it may read, once it is made here."""
    with open(path, "a", encoding="utf-8", opener=_opener(PRIVATE)) as file:
        file.write(f"{line}\n")


def _system_error(error: BaseException) -> int | None:
    """The number of the operating system's error behind a failed write, None for another failure."""
    while isinstance(error, RuntimeError) and error.__context__ is not None:
        error = error.__context__
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else None


def write_folder_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` fill a temporary folder next to `path`, then put it in place in one step; on failure leave nothing.

    Raises ValueError when there is a folder with content already.
    """
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(
            f"Folder is not empty: got {shorten(str(path), 300)}, expected a new one. Choose another name."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        fill(temporary)
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    except BaseException:  # an interrupted write leaves nothing behind either
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sweep(folder: Path, name: str = "*") -> int:
    """Remove what killed processes left of files of this name (a pattern); returns how many bytes that frees.

    Only for a folder, or a name, that nobody else is writing.
    """
    freed = 0
    for path in folder.glob(f".{name}.*.tmp"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            freed += path.stat().st_size
            path.unlink(missing_ok=True)
    return freed


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.DOTALL)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
