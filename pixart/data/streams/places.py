"""Where a stream's files come from: a folder, or an address with a cache of bounded size that processes share."""

import contextlib
import hashlib
import http.client
import logging
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...files.atomic import write_atomically
from ...files.inside import is_plain_name
from ...files.locks import locked
from ...quoting import plain, shorten

DIGEST_BYTES = 20
TRIES = 6
_FIRST_PAUSE_S = 0.2
_WAIT_S = 60.0
_POLL_S = 0.05
_CHUNK = 2**20

logger = logging.getLogger(__name__)


def digest_of(path: Path) -> bytes:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _new_hash).digest() if hasattr(hashlib, "file_digest") else _digest(file)


def _new_hash():
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def _digest(file: BinaryIO) -> bytes:
    state = _new_hash()
    while chunk := file.read(_CHUNK):
        state.update(chunk)
    return state.digest()


def is_address(where: str | os.PathLike) -> bool:
    """Whether a text is the address of something on a network, and no path."""
    return "://" in os.fspath(where)


class Folder:
    """A stream's files on a disk."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._checked: set[str] = set()

    def file(self, name: str, size: int, digest: bytes) -> Path:
        """The path of a file. Raises OSError when it is not as it was written."""
        path = self.folder / name
        is_whole = path.is_file() and path.stat().st_size == size
        if not is_whole or (name not in self._checked and digest_of(path) != digest):
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
            raise _lost(name, str(self.folder), found + " of another checksum" * is_whole, size)
        self._checked.add(name)
        return path


class Cache:
    """A stream's files at an address, of which a folder keeps those that were used last.

    limit_bytes: how much of them; what is read at the moment may go beyond it. Any number of processes may share the
    folder: each file is fetched once.
    """

    def __init__(self, address: str, folder: Path, limit_bytes: int):
        self.address, self.folder, self.limit_bytes = address.rstrip("/"), Path(folder), limit_bytes
        self._checked: set[str] = set()  # of this process: a disk may have lost what an earlier one has fetched

    def file(self, name: str, size: int, digest: bytes) -> Path:
        """The path of a file, fetched where it is not there. Raises OSError naming it when it cannot be had."""
        path = self.folder / name
        while not self._is_there(path, size, digest):
            with locked(self.folder / f".{name}.lock") as is_ours:
                if is_ours and not self._is_there(path, size, digest):
                    self._fetch(path, size, digest)
                    self._make_room(path)
            if not is_ours:
                time.sleep(_POLL_S)
        return path

    def _is_there(self, path: Path, size: int, digest: bytes) -> bool:
        try:
            is_whole = path.stat().st_size == size and (path.name in self._checked or digest_of(path) == digest)
            if is_whole:
                os.utime(path)
                self._checked.add(path.name)
        except OSError:
            return False
        return is_whole

    def _fetch(self, path: Path, size: int, digest: bytes) -> None:
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                write_atomically(path, lambda temporary: self._download(path.name, temporary, size, digest))
                return
            except _FAILURES as error:
                problem = plain(str(error), 200) or type(error).__name__
                logger.warning(
                    "Shard %s could not be fetched (try %d of %d): %s", path.name, attempt + 1, TRIES, problem
                )
        raise _lost(path.name, self.address, f"{problem}, {TRIES} times", size)

    def _download(self, name: str, path: Path, size: int, digest: bytes) -> None:
        """What a cut connection has brought is kept, and the next one goes on behind it."""
        with path.open("wb") as file:
            for _ in range(TRIES):
                start = file.tell()
                try:
                    with open_address(f"{self.address}/{name}", start) as source:
                        if not source.goes_on:
                            file.seek(0)
                        while chunk := source.read(_CHUNK):
                            file.write(chunk)
                except _FAILURES:
                    if file.tell() == start:
                        raise
                if file.tell() >= size:
                    break
            file.truncate()
        if path.stat().st_size != size or digest_of(path) != digest:
            raise OSError(f"{path.stat().st_size} bytes whose checksum is another")

    def _make_room(self, newest: Path) -> None:
        files = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(OSError):
                files.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit_bytes:
                return
            if path != newest:
                with contextlib.suppress(OSError):  # another process was first, or Windows has it open
                    path.unlink()
                    (self.folder / f".{path.name}.lock").unlink(missing_ok=True)
                total -= size


_FAILURES = (OSError, http.client.HTTPException, urllib.error.URLError, ValueError)


def _lost(name: str, where: str, got: str, size: int) -> OSError:
    return OSError(
        f"Shard cannot be read: got {got} for {shorten(name, 80)} of {shorten(where, 300)}, expected {size} bytes as "
        f"they were written. Mend the connection or the file and start again; the training goes on where it was."
    )


class _Source:
    """An open file at an address. goes_on: whether it begins where it was asked to, or at its beginning."""

    def __init__(self, file, goes_on: bool):
        self._file, self.goes_on = file, goes_on

    def read(self, size: int) -> bytes:
        """Raises IncompleteRead for a connection that ends too early, which http.client passes over."""
        data = self._file.read(size)
        if not data and getattr(self._file, "length", None):
            raise http.client.IncompleteRead(data, self._file.length)
        return data


@contextlib.contextmanager
def open_address(address: str, start: int = 0) -> Iterator[_Source]:
    """A file on a network, from a byte on. Raises what its protocol raises, and ModuleNotFoundError without fsspec."""
    scheme = urllib.parse.urlparse(address).scheme
    if scheme in ("http", "https"):
        request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
        with urllib.request.urlopen(request, timeout=_WAIT_S) as response:
            yield _Source(response, start == 0 or response.status == 206)
        return
    try:
        import fsspec
    except ImportError as error:
        raise ModuleNotFoundError(
            f"Package missing: got no 'fsspec', expected it for addresses such as {shorten(scheme)}://. Install it "
            f"with: pip install fsspec"
        ) from error
    with fsspec.open(address, "rb") as file:
        file.seek(start)
        yield _Source(file, True)


def fetch_small(address: str, name: str, most_bytes: int) -> bytes:
    """A file without a known size, such as the first that is read. Raises OSError naming it."""
    if not is_plain_name(name):
        raise ValueError(f"Wrong name: got {shorten(name)}, expected one without folders. Write the stream again.")
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
        try:
            with open_address(f"{address.rstrip('/')}/{name}") as source:
                data = b""
                while len(data) <= most_bytes and (chunk := source.read(_CHUNK)):
                    data += chunk
                return data
        except _FAILURES as error:
            problem = plain(str(error), 200) or type(error).__name__
    raise OSError(
        f"Stream cannot be opened: got {problem} for {shorten(name, 80)} of {shorten(address, 300)}, {TRIES} times, "
        f"expected an answer. Correct the address, or mend the connection."
    )


class Ahead(threading.Thread):
    """Fetches files before they are asked for; what fails here is tried again by who needs it."""

    def __init__(self, place: Folder | Cache, files: list[tuple[str, int, bytes]]):
        super().__init__(name="pixart-stream", daemon=True)
        self._place, self._files = place, files

    def run(self) -> None:
        for name, size, digest in self._files:
            try:
                self._place.file(name, size, digest)
            except OSError as error:
                logger.warning("%s", error)
                return
