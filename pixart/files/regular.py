"""Reads regular files within a size: no pipe that never ends, no device, nothing that fills the memory."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..quoting import shorten

MEGABYTE = 10**6
CONFIG_BYTES = 16 * MEGABYTE  # the index of the largest models has a tenth of it
# Two million captions of 500 letters; tables are read whole, and stand in memory as about five times their size.
TABLE_BYTES = 1000 * MEGABYTE
_CHUNK = 2**20


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A regular file, to read. A link counts as what it leads to; see `inside` for those that lead out of a folder.

    Raises OSError, FileNotFoundError among them, and ValueError for a pipe, a device, a socket or a folder.
    """
    # Without waiting: to open a pipe would last until somebody writes to it.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        check_mode(os.fstat(number).st_mode, path)
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def check_mode(mode: int, path: str | os.PathLike) -> None:
    """Raises ValueError for the mode of anything but a regular file."""
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder"}
        kind = kinds.get(stat.S_IFMT(mode), "no file")
        raise ValueError(
            f"Not a file: got {kind} named {shorten(Path(path).name)}, expected a regular file. Put one in its place."
        )


def read_bytes(path: str | os.PathLike, most_bytes: int) -> bytes:
    """The content of a regular file. Raises as `open_regular`, and ValueError for more than `most_bytes`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= most_bytes:
            parts, left = [], most_bytes + 1  # a file may grow, and those of /proc say that they are empty
            while left > 0 and (part := file.read(min(left, max(size + 1, _CHUNK)))):
                parts.append(part)
                left -= len(part)
            if left > 0:
                return b"".join(parts)
    raise too_large(path, max(size, most_bytes + 1), most_bytes)


def read_text(path: str | os.PathLike, most_bytes: int = CONFIG_BYTES, encoding: str = "utf-8-sig") -> str:
    """The text of a regular file, as `read_bytes`. Raises UnicodeDecodeError, a ValueError, for another encoding."""
    return read_bytes(path, most_bytes).decode(encoding)


def too_large(path: str | os.PathLike, size: int, most_bytes: int) -> ValueError:
    """The error for a file beyond its limit."""
    return ValueError(
        f"File too large: got {_megabytes(size)} in '{Path(path).name:.80}', expected at most "
        f"{_megabytes(most_bytes)}. Choose another file, or split it."
    )


def _megabytes(size: int) -> str:
    return f"{size / MEGABYTE:,.1f} MB"
