"""Names in the host's folders: model files, folders of the Hugging Face kind (the host lists none), new outputs."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import folder_paths

_DEPTH = 4  # as deep as a Hugging Face cache lies: models--x/snapshots/y/text_encoder


def find_folders(kinds: tuple[str, ...], wanted: Callable[[Path], bool]) -> dict[str, Path]:
    """Folders below the host's model folders of these kinds: {name relative to it, with a slash at the end: path}."""
    found: dict[str, Path] = {}
    for kind in kinds:
        for root in map(Path, folder_paths.get_folder_paths(kind)):
            for folder in _walk(root, _DEPTH):
                if _fits(wanted, folder):
                    found.setdefault(f"{folder.relative_to(root).as_posix()}/", folder)
    return found


def _fits(wanted: Callable[[Path], bool], folder: Path) -> bool:
    try:
        return wanted(folder)
    except OSError:  # one folder that is not ours to read must not take the others from the list
        return False


def list_files(kinds: tuple[str, ...]) -> list[str]:
    """The names of all files of these kinds, each once."""
    return list(dict.fromkeys(name for kind in kinds for name in folder_paths.get_filename_list(kind)))


def find_file(kinds: tuple[str, ...], name: str) -> Path:
    """The path of a file of these kinds. Raises FileNotFoundError; a name never leads out of the folders."""
    for kind in kinds:
        if name in folder_paths.get_filename_list(kind):
            return Path(folder_paths.get_full_path_or_raise(kind, name))
    places = " or ".join(f"models/{kind}" for kind in kinds)
    raise FileNotFoundError(
        f"File not found: got '{name}', expected a file in {places}. Press R to refresh the lists, and choose another."
    )


def find_folder(kinds: tuple[str, ...], wanted: Callable[[Path], bool], name: str) -> Path:
    """The path of one of find_folders. Raises FileNotFoundError."""
    found = find_folders(kinds, wanted).get(name)
    if found is None:
        places = " or ".join(f"models/{kind}" for kind in kinds)
        raise FileNotFoundError(
            f"Folder not found: got '{name}', expected one in {places}. Press R to refresh the lists, and choose "
            f"another."
        )
    return found


def next_output(prefix: str, suffix: str = "") -> Path:
    """A new path below the host's output folder, numbered as the host's save nodes do it: `prefix_00001_suffix`.

    prefix: folders and the start of the name, with `%date%`-like variables of the host. suffix: `.safetensors`, or
    nothing for a folder. Raises ValueError for a prefix that is no name or leads out of the output folder.
    """
    output = _check_output_name(prefix)
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, output)
    return Path(folder, f"{name}_{counter:05}_{suffix}")


def output_folder(name: str) -> Path:
    """A folder below the host's output folder, whether it is there or not. Raises ValueError as next_output does."""
    return Path(_check_output_name(name), name)


def user_file(name: str) -> Path:
    """A file of the user's in the host's user folder, whether it is there or not."""
    return Path(folder_paths.get_user_directory(), name)


def _check_output_name(prefix: str) -> str:
    """The host's output folder."""
    output = os.path.realpath(folder_paths.get_output_directory())
    parts = prefix.replace("\\", "/").split("/")
    is_name = parts[-1].strip(" .") and ".." not in parts and not re.search(r'[<>:"|?*\x00-\x1f]', prefix)
    if not is_name or os.path.commonpath([output, os.path.realpath(os.path.join(output, prefix))]) != output:
        raise ValueError(
            f"Unusable file name: got '{prefix}', expected a name like 'loras/my_lora', which stays in the output "
            f"folder. Correct the name."
        )
    return output


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    try:
        inner = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:  # absent, or not ours to read
        return
    for entry in inner:
        yield entry
        if depth > 1:
            yield from _walk(entry, depth - 1)
