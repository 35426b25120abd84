"""Pictures and captions in tar files: WebDataset's form, and SA-1B's, whose captions lie in a folder beside them."""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..files.documents import parse_json
from ..files.regular import MEGABYTE, open_regular
from ..quoting import list_names, plain, shorten
from .pictures import PICTURE_SUFFIXES, ArchivePicture
from .records import wrong_table

TEXT_SUFFIXES = ("txt", "caption", "text", "cap")
_JSON_BYTES = 64 * MEGABYTE  # SA-1B's hold the masks of a picture
_TEXT_BYTES = MEGABYTE


@dataclass
class Sample:
    """The files of one name in a tar file: {suffix behind the first dot: (offset, size)}."""

    archive: Path
    name: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)

    def picture(self, wanted: str, without: Sequence[str]) -> tuple[ArchivePicture | None, str | None]:
        """(the picture with a suffix or the only one but for some suffixes, None) or (None, what is wrong)."""
        if wanted:
            found = [suffix for suffix in self.files if suffix == wanted]
        else:
            found = [suffix for suffix in self.files if is_picture(suffix) and suffix not in without]
        if len(found) == 1:
            return ArchivePicture(self.archive, *self.files[found[0]]), None
        return None, f"pictures of the suffixes {list_names(found)}: name one" if found else "no picture of its name"

    def caption(self, wanted: str, names: Sequence[str]) -> object:
        """The text beside a picture, or a value of its .json as it is, such as a list. wanted: suffix or value's name.

        Raises OSError, and ValueError for JSON that is none.
        """
        texts = (wanted,) if wanted in self.files else () if wanted else TEXT_SUFFIXES
        suffix = next((suffix for suffix in texts if suffix in self.files), None)
        if suffix is not None:
            return self._read(suffix, _TEXT_BYTES).decode("utf-8", "replace")
        if "json" not in self.files:
            return None
        values = parse_json(self._read("json", _JSON_BYTES))
        if not isinstance(values, dict):
            return None
        return next((values[name] for name in ((wanted,) if wanted else names) if name in values), None)

    def _read(self, suffix: str, most_bytes: int) -> bytes:
        offset, size = self.files[suffix]
        if size > most_bytes:
            raise ValueError(f"a .{suffix} of {size} bytes, expected at most {most_bytes}")
        with open_regular(self.archive) as file:
            file.seek(offset)
            return file.read(size)


def is_picture(suffix: str) -> bool:
    """Whether a suffix such as `jpg` or `left.png` is of a picture."""
    return f".{suffix.rpartition('.')[2].lower()}" in PICTURE_SUFFIXES


def tar_files(path: Path) -> list[Path]:
    """The tar files of a dataset: the file itself, or those in a folder."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".tar" else []
    return sorted(entry for entry in path.iterdir() if entry.suffix.lower() == ".tar")


def read_samples(archive: Path) -> Iterator[Sample]:
    """What lies in a tar file, by names up to their first dot; only headers are read.

    Raises ValueError for another content, also for a tar file that was cut or is compressed.
    """
    samples: dict[str, Sample] = {}
    try:
        with open_regular(archive) as file, tarfile.open(fileobj=file, mode="r:") as members:
            for member in members:
                path = PurePosixPath(member.name)
                stem, _, suffix = path.name.partition(".")
                if member.isreg() and not member.issparse() and stem and suffix:
                    name = (path.parent / stem).as_posix()
                    sample = samples.setdefault(name, Sample(archive, name))
                    sample.files.setdefault(suffix, (member.offset_data, member.size))
                members.members.clear()  # which it would keep
    except (tarfile.TarError, EOFError) as error:
        got = f"no tar file ({shorten(plain(str(error), 100))})"
        raise wrong_table(archive, got, "one that is whole and not compressed") from error
    yield from samples.values()
