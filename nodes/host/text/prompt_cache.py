"""Encoded prompts on disk, so that one that was seen before needs no T5. Bounded, and the user's alone.

A file's name is a hash of all that the encoding depends on: the tokens and their weights, the encoder's file, the
tokenizer and the precision. Prompts themselves are not written. The environment variable PIXART_PROMPT_CACHE=0 turns
it off.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
from pathlib import Path

import comfy.model_management
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ....pixart.files.atomic import PRIVATE, write_atomically
from ..server.users import own_user_folder
from . import t5

log = logging.getLogger(__name__)

SWITCH = "PIXART_PROMPT_CACHE"
LIMIT_BYTES = 512 * 2**20
_FORMAT = "1"  # raised when the same key would give other states
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of a file of weights, evenly spaced: any other encoder differs in them
_NAME = "states"


def folder() -> Path:
    """Where the files lie: in the user folder of whoever sent the prompt."""
    return own_user_folder() / "pixart_prompts"


def key_of(clip, tokens: list[tuple]) -> str | None:
    """The name of an encoding; None where it is not to be kept.

    That is with the cache off, with a text encoder that is patched, scheduled or not loaded by this pack, and with
    textual inversions, whose tokens are tensors.
    """
    patcher = clip.patcher
    loader = getattr(patcher, "cached_patcher_init", None)
    ours = loader is not None and loader[0] is t5._load_patcher
    patched = patcher.patches or getattr(patcher, "forced_hooks", None) or getattr(clip, "use_clip_schedule", False)
    plain = all(isinstance(token, int) for token, _ in tokens)
    if os.environ.get(SWITCH) == "0" or not ours or patched or not plain:
        return None
    path, tokenizer, _ = loader[1]
    try:
        files = [*_weights_of(path), *_weights_of(tokenizer)]
        identity = [_identify(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError:  # the file went, or is on a drive that did
        return None
    told = [_FORMAT, identity, tokens, clip.layer_idx, str(patcher.load_device.type), str(patcher.model_dtype())]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=20).hexdigest()


def read(key: str) -> torch.Tensor | None:
    """The states (1, L, D) kept under a key, where the host keeps its own; None without any. A damaged file is removed.

    Nothing that goes wrong here stops a picture: the prompt is encoded again.
    """
    path = folder() / f"{key}.safetensors"
    try:
        states = load_file(path)[_NAME]
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, OSError) as error:
        log.warning("Prompt cache: %s cannot be read (%s); the prompt is encoded again.", path.name, error)
        if not isinstance(error, OSError):
            with contextlib.suppress(OSError):
                path.unlink()
        return None
    with contextlib.suppress(OSError):  # of a folder that may only be read
        os.utime(path)  # the least recently used go first
    return states.to(comfy.model_management.intermediate_device())


def write(key: str, states: torch.Tensor) -> None:
    """Keep states (1, L, D) under a key, and remove the least recently used beyond LIMIT_BYTES."""
    place = folder()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.chmod(0o700)
        tensors = {_NAME: states.detach().cpu().contiguous()}
        path = place / f"{key}.safetensors"
        write_atomically(path, lambda temporary: save_file(tensors, temporary), mode=PRIVATE)
        _trim(place)
    except OSError as error:
        log.warning("Prompt cache: nothing was kept (%s).", error)


def _trim(place: Path) -> None:
    files = []
    for file in place.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # another program has removed it
            files.append((file.stat(), file))
    files.sort(key=lambda pair: pair[0].st_mtime_ns)
    excess = sum(stat.st_size for stat, _ in files) - LIMIT_BYTES
    for stat, file in files:
        if excess <= 0:
            break
        file.unlink(missing_ok=True)
        excess -= stat.st_size


def _weights_of(path: Path | None) -> list[Path]:
    if path is None:
        return []
    path = Path(path)
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


@functools.lru_cache(maxsize=256)
def _identify(path: str, size: int, changed_ns: int) -> str:
    """A hash of a file's size and of samples of its bytes. changed_ns: so that a file that changes is read again."""
    state = hashlib.blake2b(str(size).encode(), digest_size=20)
    with open(path, "rb") as file:
        for number in range(_SAMPLES):
            file.seek(number * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            state.update(file.read(_SAMPLE_BYTES))
    return state.hexdigest()
