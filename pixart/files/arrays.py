"""NumPy's files of strangers, within what they hold: no objects, and no more numbers than there are bytes."""

import io
import math
import os
import zipfile
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from .regular import MEGABYTE, open_regular, read_bytes, too_large

ARRAY_BYTES = 64 * MEGABYTE  # a caption of 300 tokens has 5, a latent of a 2048 px picture 2
_MOST_ENTRIES = 64
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_array(path: str | os.PathLike) -> np.ndarray:
    """The array of a .npy file. Raises OSError, and ValueError for another file or one that claims too much."""
    content = read_bytes(path, ARRAY_BYTES)
    return _read(io.BytesIO(content), len(content))


def read_shape(path: str | os.PathLike) -> tuple[int, ...]:
    """The shape of the array in a .npy file, of which only the header is read. Raises as `read_array`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > ARRAY_BYTES:
            raise too_large(path, size, ARRAY_BYTES)
        return _read_header(file, size)


def read_arrays(path: str | os.PathLike, *names: str) -> dict[str, np.ndarray]:
    """Those of these arrays that are in a .npz file. Raises as `read_array`, and zipfile.BadZipFile."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if size > ARRAY_BYTES:
            raise too_large(path, size, ARRAY_BYTES)
        if len({entry.filename for entry in entries}) < len(entries) or len(entries) > _MOST_ENTRIES:
            raise ValueError(f"an archive of {len(entries)} arrays, some of one name or more than {_MOST_ENTRIES}")
        wanted = [entry for entry in entries if Path(entry.filename).stem in names]
        contents = {Path(entry.filename).stem: archive.read(entry) for entry in wanted}
    return {name: _read(io.BytesIO(content), len(content)) for name, content in contents.items()}


def _read(file: BinaryIO, size: int) -> np.ndarray:
    _read_header(file, size)
    file.seek(0)
    return npy.read_array(file, allow_pickle=False)


def _read_header(file: BinaryIO, size: int) -> tuple[int, ...]:
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"an array of version {version}, and {' and '.join(map(str, _HEADERS))} are known")
    try:
        shape, _, dtype = _HEADERS[version](file)
    except (
        SyntaxError,
        TokenError,
        RecursionError,
        MemoryError,
        TypeError,
    ) as error:  # of Python's reader
        raise ValueError("an unreadable header") from error
    held = size - file.tell()
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which only a program could read")
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize > held:
        raise ValueError(f"an array that claims {math.prod(shape):.4g} numbers in a file of {held} bytes")
    return shape
