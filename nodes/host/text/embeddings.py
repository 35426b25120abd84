"""CONDITIONING as files, so that a graph runs without a text encoder."""

import json
import stat
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ....pixart.files.atomic import PRIVATE, write_atomically
from ....pixart.files.documents import parse_json
from ....pixart.quoting import list_names, shorten
from ..folders import is_inner, next_output, open_paths

PLACES = {"output": folder_paths.get_output_directory, "input": folder_paths.get_input_directory}
_SUFFIX = ".safetensors"
_KEY = "pixart_embeddings"
_KNOWN_HEADERS = 4096  # files whose headers are remembered
_TENSORS = ("states", "attention_mask")


def save_embeddings(conditioning: list, prefix: str) -> str:
    """Write a conditioning below the output folder. Returns its name among list_embeddings.

    Raises ValueError for what a file cannot hold: ControlNets and hooks.
    """
    tensors, entries = {}, []
    for index, (states, extra) in enumerate(conditioning):
        tensors[f"{index}.states"] = _own(states)
        rest = {name: value for name, value in extra.items() if value is not None}
        mask = rest.pop("attention_mask", None)
        if mask is not None:
            tensors[f"{index}.attention_mask"] = _own(mask)
        entries.append(rest)
    try:
        texts = {_KEY: json.dumps(entries), "format": "pt"}
    except TypeError as error:
        names = sorted({name for entry in entries for name, value in entry.items() if not _is_plain(value)})
        raise ValueError(
            f"Conditioning cannot be saved: got {list_names(names)} in it, expected a caption alone. Save the "
            f"output of the text node, and apply ControlNets and hooks after loading."
        ) from error
    path = next_output(prefix, _SUFFIX, is_private=True)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=texts), mode=PRIVATE)
    root = Path(folder_paths.get_output_directory()).resolve()
    return f"output/{path.resolve().relative_to(root).as_posix()}"


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with memory of its own, as safetensors wants it: parts of one prompt share theirs."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _is_plain(value) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def list_embeddings() -> list[str]:
    """What can be loaded: `output/...` and `input/...`, files of this kind."""
    found = []
    for place, get in PLACES.items():
        root = Path(get())
        files = sorted(root.rglob(f"*{_SUFFIX}")) if root.is_dir() else []
        found += [f"{place}/{file.relative_to(root).as_posix()}" for file in files if _entries_of(file) is not None]
    return found


def load_embeddings(name: str) -> list:
    """The CONDITIONING of one of list_embeddings. Raises FileNotFoundError for other names, ValueError for damage."""
    path = _find(name)
    entries = None if path is None else _entries_of(path)
    if entries is None:
        raise FileNotFoundError(
            f"Prompt embeddings not found: got {shorten(name)}, expected a file of Save Prompt Embeddings in "
            f"ComfyUI's output or input folder. Press R to refresh the list, and choose another."
        )
    conditioning, device = [], comfy.model_management.intermediate_device()
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for index, extra in enumerate(entries):
            given = [key for key in _TENSORS if f"{index}.{key}" in names]
            found = {key: file.get_tensor(f"{index}.{key}").to(device) for key in given}
            states = found.pop("states", torch.empty(0))
            if states.ndim != 3:
                raise ValueError(
                    f"Damaged prompt embeddings: got no states in {shorten(name)}, expected (batch, length, width). "
                    f"Save them again."
                )
            lists = {key: tuple(value) if isinstance(value, list) else value for key, value in extra.items()}
            conditioning.append([states, {"pooled_output": None, **lists, **found}])
    return conditioning


def fingerprint_embeddings(name: str) -> tuple[int, int] | None:
    """What changes with a file: another may come under the name of one that was removed. None without one."""
    path = _find(name)
    try:
        found = None if path is None else path.stat()
    except OSError:
        return None
    return found and (found.st_size, found.st_mtime_ns)


def _find(name: str) -> Path | None:
    """The path that a name stands for, whether there is a file or not; None for one that leads out of the folders."""
    place, _, inner = name.partition("/")
    if place not in PLACES or not inner.endswith(_SUFFIX) or not is_inner(inner):
        return None
    path = Path(PLACES[place](), inner)
    return path if open_paths()(path) else None


def _entries_of(path: Path) -> list[dict] | None:
    """What the header of a file says of its prompts, None for files of another kind."""
    try:
        state = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(state.st_mode):  # opening a pipe would block
        return None
    return deepcopy(_read_entries(path, state.st_size, state.st_mtime_ns))


@lru_cache(maxsize=_KNOWN_HEADERS)
def _read_entries(path: Path, size: int, time_ns: int) -> list[dict] | None:
    """The header of a file as it was at a time: the editor asks for the list again and again."""
    try:
        with safe_open(path, framework="pt") as file:
            entries = parse_json((file.metadata() or {}).get(_KEY, "null"))
    except (SafetensorError, OSError, ValueError):
        return None
    return entries if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries) else None
