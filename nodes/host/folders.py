"""Where a prompt may read and write, and how paths are shown: a prompt may come from anybody.

Every name and path out of a prompt goes through this module: names of models, new outputs, and paths that are typed.
"""

import ipaddress
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import folder_paths
from comfy.cli_args import args

from ...pixart.files.names import fault_of, has_hidden_letters, is_device
from ...pixart.quoting import shorten

log = logging.getLogger(__name__)

FOLDERS_VARIABLE, FOLDERS_FILE = "PIXART_FOLDERS", "pixart_folders.txt"
GGUF_KINDS = ("diffusion_models", "text_encoders", "t5", "controlnet")
DEMO_MODELS = Path(__file__).resolve().parents[2] / "demo" / "models"
_CLOCK_NS = 2_000_000_000  # what file systems tell times to, at the worst
_DEPTH = 4  # as deep as a Hugging Face cache lies: models--x/snapshots/y/text_encoder


@dataclass
class _Tree:
    """The folders below a root, and what they were like when they were walked."""

    root: Path
    folders: list[Path]
    stamps: dict[str, tuple | None]  # of the folders, and of the JSON files in them, which are asked what a folder is
    is_settled: bool  # nothing in it had changed just before, when its clock could not show a further change
    fitting: dict[Callable, list[Path]] = field(default_factory=dict)

    def is_current(self) -> bool:
        return self.is_settled and all(_stamp(path) == stamp for path, stamp in self.stamps.items())

    def find(self, wanted: Callable[[Path], bool]) -> list[Path]:
        if wanted not in self.fitting:
            self.fitting[wanted] = [folder for folder in self.folders if _fits(wanted, folder)]
        return self.fitting[wanted]


_trees: dict[Path, _Tree] = {}
_ggufs: dict[str, tuple[object, list[str]]] = {}  # by kind: the host's list, and the names that it leaves out


def register_demo() -> None:
    """Offer the demo's models after all that the user has: of two files of one name the host takes the first."""
    for folder in sorted(each for each in DEMO_MODELS.glob("*") if each.is_dir()):
        folder_paths.add_model_folder_path(folder.name, str(folder))


def find_folders(kinds: tuple[str, ...], wanted: Callable[[Path], bool]) -> dict[str, Path]:
    """Folders below the host's model folders of these kinds: {name relative to it, with a slash at the end: path}.

    wanted: a function that is there for good, since what it said is remembered while the folders stay as they are.
    """
    found: dict[str, Path] = {}
    known = folder_paths.folder_names_and_paths
    for kind in [each for each in kinds if folder_paths.map_legacy(each) in known]:
        for root in map(Path, folder_paths.get_folder_paths(kind)):
            for folder in _tree(root).find(wanted):
                found.setdefault(f"{folder.relative_to(root).as_posix()}/", folder)
    return found


def _tree(root: Path) -> _Tree:
    """Folders are walked once, and looked at again once in each of the host's lists of all nodes."""
    key = f"pixart folders below {root}"
    tree = folder_paths.cache_helper.get(key)
    if tree is None:
        tree = _trees.get(root)
        if tree is None or not tree.is_current():
            tree = _trees[root] = _walk(root)
        folder_paths.cache_helper.set(key, tree)
    return tree


def _stamp(path: str) -> tuple | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode


def _walk(root: Path) -> _Tree:
    began_ns = time.time_ns()
    folders: list[Path] = []
    paths = [str(root)]
    _collect(root, _DEPTH, folders, paths)
    stamps = {path: _stamp(path) for path in paths}
    newest_ns = max((stamp[0] for stamp in stamps.values() if stamp), default=0)
    return _Tree(root, folders, stamps, newest_ns < began_ns - _CLOCK_NS)


def _collect(folder: Path, depth: int, folders: list[Path], paths: list[str]) -> None:
    """Add the folders below one, depth first, and the paths that tell of a change; one level more than is listed."""
    try:
        with os.scandir(folder) as entries:
            inner = sorted(
                (entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: Path(entry.path)
            )
    except OSError:  # absent, or not ours to read
        return
    for entry in inner:
        is_folder = entry.is_dir()
        if is_folder or entry.name.endswith(".json"):
            paths.append(entry.path)
        if is_folder and depth > 0:
            folders.append(Path(entry.path))
            _collect(folders[-1], depth - 1, folders, paths)


def _fits(wanted: Callable[[Path], bool], folder: Path) -> bool:
    try:
        return wanted(folder)
    except OSError:  # one folder that is not ours to read must not take the others from the list
        return False


def names_of(kind: str) -> list[str]:
    """The host's list of files, and GGUF files where it leaves them out.

    The host remembers folders, and fails for ever when one of them is removed.
    """
    if folder_paths.map_legacy(kind) not in folder_paths.folder_names_and_paths:
        return []
    try:
        names = folder_paths.get_filename_list(kind)
    except FileNotFoundError:
        folder_paths.filename_list_cache.pop(folder_paths.map_legacy(kind), None)
        names = folder_paths.get_filename_list(kind)
    return sorted({*names, *_gguf_names(kind)}) if kind in GGUF_KINDS else names


def _gguf_names(kind: str) -> list[str]:
    """Names relative to the host's folders of this kind, as the host writes them; known as long as its own list is."""
    known = folder_paths.filename_list_cache.get(folder_paths.map_legacy(kind))
    if kind in _ggufs and _ggufs[kind][0] is known:
        return _ggufs[kind][1]
    names: list[str] = []
    for folder in folder_paths.get_folder_paths(kind):
        if os.path.isdir(folder):
            names += folder_paths.recursive_search(folder, excluded_dir_names=[".git"])[0]
    names = [name for name in names if name.lower().endswith(".gguf")]
    _ggufs[kind] = (known, names)
    return names


def list_files(kinds: tuple[str, ...]) -> list[str]:
    """The names of all files of these kinds, each once."""
    return list(dict.fromkeys(name for kind in kinds for name in names_of(kind)))


def find_file(kinds: tuple[str, ...], name: str) -> Path:
    """The path of a regular file of these kinds. Raises FileNotFoundError; a name never leads out of the folders."""
    for kind in kinds:
        path = folder_paths.get_full_path(kind, name) if name in names_of(kind) else None
        if path is not None:  # the host lists pipes and devices, and gives no path for them
            return Path(path)
    places = " or ".join(f"models/{kind}" for kind in kinds)
    raise FileNotFoundError(
        f"File not found: got {shorten(name)}, expected a file in {places}. Press R to refresh the lists, and choose "
        f"another."
    )


def find_folder(kinds: tuple[str, ...], wanted: Callable[[Path], bool], name: str) -> Path:
    """The path of one of find_folders. Raises FileNotFoundError."""
    found = find_folders(kinds, wanted).get(name)
    if found is None:
        places = " or ".join(f"models/{kind}" for kind in kinds)
        raise FileNotFoundError(
            f"Folder not found: got {shorten(name)}, expected one in {places}. Press R to refresh the lists, and "
            f"choose another."
        )
    return found


def is_inner(name: str) -> bool:
    """Whether a name stays below the folder that it is joined to, on any system, and can be one of a file there."""
    parts = name.replace("\\", "/").rstrip("/").split("/")
    return not any(part in ("", ".", "..") or ":" in part or _fault_of_part(part) for part in parts)


def next_output(prefix: str, suffix: str = "", is_private: bool = False) -> Path:
    """A new path below the host's output folder, numbered as the host's save nodes do it: `prefix_00001_suffix`.

    prefix: folders and the start of the name, with `%date%`-like variables of the host. suffix: `.safetensors`, or
    nothing for a folder. is_private: a folder that is made for it is open to the server's own account alone.
    Raises ValueError for a prefix that is no name or leads out of the output folder.
    """
    path = output_folder(prefix)
    if is_private:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    output = os.path.realpath(folder_paths.get_output_directory())
    folder, name, counter, _, _ = folder_paths.get_save_image_path(path.relative_to(output).as_posix(), output)
    return Path(folder, f"{name}_{counter:05}_{suffix}")


def output_folder(name: str, below: str = "") -> Path:
    """A folder below the host's output folder, whether it is there or not. below: one that it has to stay in.

    Raises ValueError for a name that leads out of it, or that some file system does not take.
    """
    output = Path(os.path.realpath(folder_paths.get_output_directory()), below)
    parts = name.replace("\\", "/").split("/")
    fault = next(filter(None, map(fault_of, parts)), None)
    path = output.joinpath(*parts) if fault is None else output
    if fault is None and not _lies_in(os.path.realpath(path), _with_real([output, *_own_folders()])):
        fault = "a link that leads out of the output folder"
    if fault is not None:
        place = Path("output", below).as_posix()
        raise ValueError(
            f"Unusable file name: got {shorten(name)} with a part that is {fault}, expected a name like "
            f"'loras/my_lora', which stays in {place}. Correct the name."
        )
    return path


def user_file(name: str) -> Path:
    """A file of the user's in the host's user folder, whether it is there or not."""
    return Path(folder_paths.get_user_directory(), name)


class TypedPath(NamedTuple):
    """Where a typed path leads.

    is_confined: what lies there may name other files in its own folder alone. is_known: it lies in a folder of the
    host's, or in one that the server's owner lists, so that its content may be shown.
    """

    path: Path
    is_confined: bool
    is_known: bool


def find_typed(path: str, root: str, what: str) -> TypedPath:
    """Where a path out of a prompt leads: relative to `root`, or absolute. what: what is looked for, for the errors.

    Absolute paths, and links, may lead into the host's folders and those that the owner lists; elsewhere only while
    nobody but the user of this machine can send prompts.
    Raises ValueError for any other path, before it is looked at, and FileNotFoundError when there is nothing.
    """
    text, place = path.strip().strip('"'), Path(root).name  # as Windows' "Copy as path" quotes it
    if any(map(_fault_of_part, re.split(r"[\\/]", text))):
        raise ValueError(
            f"{what} cannot be at this path: got {shorten(path)}, expected names that every system takes. Correct it."
        )
    typed = Path(os.path.expanduser(text))
    is_relative = not typed.is_absolute()
    found = Path(os.path.normpath(Path(root) / typed))
    if is_relative and not found.is_relative_to(os.path.normpath(root)):
        raise ValueError(
            f"Path leads out of ComfyUI's {place} folder: got {shorten(path)}, expected a name in it. Enter one in "
            f"it, or an absolute path."
        )
    is_known = _is_known(found)
    if not is_known and not is_private():
        raise ValueError(
            f"{what} is not open to prompts: got {shorten(path)}, expected a path in ComfyUI's input, output, temp or "
            f"model folders. Put it there, or let the owner of the server list its folder in {FOLDERS_FILE} in "
            f"ComfyUI's user folder, or in the environment variable {FOLDERS_VARIABLE}."
        )
    if not text or not os.path.exists(found):
        raise FileNotFoundError(
            f"{what} not found: got {shorten(path)}, expected a folder or file in ComfyUI's {place} folder, or an "
            f"absolute path. Correct the path."
        )
    return TypedPath(found, is_relative or not is_private(), is_known)


def open_paths() -> Callable[[Path], bool]:
    """A function that says of a file whether a prompt may read it, links followed."""
    if is_private():
        return lambda path: True
    roots = _known_roots()
    return lambda path: _lies_in(os.path.realpath(path), roots)


def is_private() -> bool:
    """Whether nobody but the user of this machine can send prompts.

    That is while the server listens on this machine's own addresses alone, for one user, and lets no foreign page in.
    """
    addresses = [address.strip().strip("[]") for address in str(args.listen or "").split(",")]
    return all(map(_is_loopback, addresses)) and not args.multi_user and args.enable_cors_header != "*"


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name, which may stand for any address
        return False


def _fault_of_part(part: str) -> bool:
    """Whether a part of a path is one that no file of ours has: a device, hidden letters, or too long."""
    return is_device(part) or has_hidden_letters(part) or len(part.encode("utf-8", "replace")) > 255


def _is_known(path: Path) -> bool:
    roots = _known_roots()
    # What is not there by its name is not looked at: on Windows even asking for \\\\server\\share sends a login.
    return _lies_in(os.path.normpath(path), roots) and _lies_in(os.path.realpath(path), roots)


def _known_roots() -> list[Path]:
    """The host's folders and the owner's, as they are called and as they are without links."""
    return _with_real([*(root for _, root in _places()), *_own_folders()])


def _with_real(folders: list[Path]) -> list[Path]:
    return list(dict.fromkeys([*folders, *(Path(os.path.realpath(folder)) for folder in folders)]))


def _lies_in(path: str, roots: list[Path]) -> bool:
    return any(map(Path(path).is_relative_to, roots))


def _own_folders() -> list[Path]:
    """The folders that the owner of the server lists, in the environment and in a file, one on each line."""
    lines = os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)
    file = user_file(FOLDERS_FILE)
    if file.is_file():
        lines += file.read_text(encoding="utf-8-sig").splitlines()
    entries = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    folders = [Path(os.path.normpath(os.path.expanduser(entry))) for entry in entries]
    for folder in folders:
        if not folder.is_absolute():
            log.warning("Folder for training data is left out: got '%s', expected an absolute path.", folder)
    return [folder for folder in folders if folder.is_absolute()]


def _places() -> list[tuple[str, Path]]:
    """(how a folder is shown, the folder): those that prompts may read, the most special of equal ones first."""
    named = [
        ("output", folder_paths.get_output_directory()),
        ("input", folder_paths.get_input_directory()),
        ("temp", folder_paths.get_temp_directory()),
    ]
    for kind, (folders, _) in folder_paths.folder_names_and_paths.items():
        named += [(f"models/{kind}", folder) for folder in folders if kind != "custom_nodes"]
    named.append(("models", folder_paths.models_dir))
    return [(name, Path(os.path.abspath(folder))) for name, folder in named]


def show_path(path: str | os.PathLike) -> str:
    """A path as others may see it: from the host's folder that it lies in, such as output/loras/a.safetensors.

    Of one that lies elsewhere the name alone.
    """
    for name, root in _places():
        for form in (root, Path(os.path.realpath(root))):
            if Path(path).is_relative_to(form):
                return Path(name, Path(path).relative_to(form)).as_posix()
    return Path(path).name


def hide_paths(text: str) -> str:
    """A text without where the host's folders lie: output/x in place of /home/me/ComfyUI/output/x."""
    shown = {}
    for name, root in [*_places(), ("user", folder_paths.get_user_directory()), ("ComfyUI", folder_paths.base_path)]:
        for form in (str(root), os.path.realpath(root)):
            if len(Path(form).parts) > 1:
                shown.setdefault(form, name)
                shown.setdefault(form.replace("\\", "\\\\"), name)  # as quoted by repr
    for form in sorted(shown, key=len, reverse=True):
        text = re.sub(rf"{re.escape(form)}(?![\w.-])", shown[form], text)
    return text
