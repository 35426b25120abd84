"""Checkpoints of a training: written whole or not at all, the last few kept, and checked before one is continued."""

import errno
import logging
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Set
from pathlib import Path

import torch

from ..data.sketches import differences
from ..files.atomic import dump, write_atomically
from ..files.space import describe_room, free_bytes
from ..quoting import list_names, plain, shorten
from ..weights.pickles import check_pth
from ..weights.reading import require_file
from .settings import TrainingSettings, settings_to_dict

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # folder of a run
_NAME = "step-{:08d}.pt"
_PATTERN = re.compile(r"step-(\d{8,})\.pt")
# What torch.load raises for files that were cut off, overwritten or never a checkpoint.
UNREADABLE = (
    *(OSError, RuntimeError, EOFError, ValueError, LookupError, ArithmeticError, pickle.UnpicklingError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
_PARTS = frozenset({"step", "seconds", "settings", "sampler", "parameters", "extra", "optimizer", "sanity"})
# Settings that a continued training may change; with any other the optimiser's state or the data would not fit.
_FREE = {
    "steps", "learning_rate", "weight_decay", "schedule", "warmup_steps", "floor", "clip_norm", "checkpointing",
    "loss", "huber_c", "weighting", "min_snr_gamma", "timestep_weights", "timesteps", "timestep_mean", "timestep_std",
    "timestep_min", "timestep_max", "caption_dropout", "noise_offset", "prior_weight", "prior_target", "lcm_guidance",
    "dmd_guidance", "dmd_regression", "mask_floor",
    "dropout", "checkpoint_every", "keep_last", "log_every", "sample_every", "sample_steps", "sample_guidance",
    "sample_seed", "gradient_release", "offload_optimizer", "validation_every", "patience", "keep_best",
    "tensorboard", "wandb", "dtype", "base_dtype", "save_dtype", "batch_size",
}  # fmt: skip


class Checkpoints:
    """The checkpoints in one folder."""

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = Path(folder), keep_last
        self.size_bytes = 0  # about that of one, for messages
        self.notes: list[str] = []  # of what the user is to hear

    def all(self) -> list[Path]:
        """All of them, the oldest first."""
        found = [path for path in self.folder.glob("step-*.pt") if _PATTERN.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(_PATTERN.fullmatch(path.name)[1]))

    def save(self, step: int, state: Mapping) -> Path:
        """Write one, and remove those beyond the last ones once it is in place.

        On a full disk all but the newest give way, once. Raises OSError when that is not enough; what there was stays.
        """
        path = self.folder / _NAME.format(step)
        try:
            self._write(path, state)
        except OSError as error:
            older = [each for each in self.all() if each != path][:-1]
            if error.errno != errno.ENOSPC or not older:
                raise self._explained(error, path) from error
            logger.warning("The disk is full: %d older checkpoints are removed", len(older))
            _remove(older)
            self._write_again(path, state)
        _remove([each for each in self.all() if each != path][: -(self.keep_last - 1) or None])
        return path

    def _write_again(self, path, state):
        try:
            self._write(path, state)
        except OSError as error:
            raise self._explained(error, path) from error

    def _write(self, path, state):
        write_atomically(path, lambda temporary: dump(dict(state), temporary))

    def load(self) -> dict | None:
        """The newest one that is undamaged, or None; those that are not are named in `notes` and passed over."""
        passed = []
        for path in reversed(self.all()):
            try:
                state = read_checked(path, _PARTS)
            except UNREADABLE as error:
                logger.warning("Checkpoint %s is damaged and is passed over: %s", path.name, shorten(error, 300))
                passed.append(path.name)
                continue
            self._note(passed, f"goes on after step {state['step']}")
            return state
        self._note(passed, "begins again")
        return None

    def _note(self, passed: list[str], what: str):
        if passed:
            self.notes.append(f"damaged, passed over: {', '.join(passed)}; the training {what}")

    def _explained(self, error: OSError, path: Path) -> OSError:
        kept = self.all()
        return OSError(
            error.errno,
            f"Checkpoint cannot be written: got '{error.strerror or error}' ({describe_room(path, self.size_bytes)}), "
            f"expected a writable disk with space. Free some space and start again; the training goes on from the last "
            f"checkpoint ({kept[-1].name if kept else 'none'})",
            str(path),
        )

    def clear(self) -> None:
        """Remove all of them."""
        _remove(self.all())


def read_checked(path: Path, parts: Set[str]) -> dict:
    """The state in a checkpoint with these parts. Raises one of UNREADABLE when any is not as it was written."""
    require_file(path)
    check_pth(path)
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # by the checksum that torch.save keeps of each part, and torch.load does not read
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} does not fit")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not parts <= state.keys():
        raise LookupError("it is no state of a training")
    return state


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises OSError when the disk has no room for what a training will write."""
    free = free_bytes(folder)
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"Disk is too full for the checkpoints: got {free / 1e6:.0f} MB free, expected "
            f"{needed_bytes / 1e6:.0f} MB; {(needed_bytes - free) / 1e6:.0f} MB are missing. Free some space, or keep "
            f"fewer checkpoints",
            str(folder),
        )


def check_origin(state: Mapping, data: str, base: Mapping | None, start: str | None = None) -> None:
    """Raises ValueError when a checkpoint was made from other pictures or another base model.

    data: the FeatureSet's identity. base: sketch of the model before the training, None where it is not known.
    start: identity of the LoRA that it began with, or None.
    A checkpoint of an earlier version, which says neither, passes.
    """
    advice = "give the training another name, or turn resume off."
    if state.get("data") not in (None, data):
        raise ValueError(
            f"Training cannot be continued with other data: got other pictures, captions or encodings than those of "
            f"its first {state['step']} steps, expected the same. Use those that it was begun with, {advice}"
        )
    if state.get("start", start) != start:
        raise ValueError(
            f"Training cannot be continued from another LoRA: got {'another' if start else 'no'} start_from than for "
            f"its first {state['step']} steps, expected the same. Name the file that it was begun with, {advice}"
        )
    wrong = differences(state["base"], base) if base is not None and state.get("base") else []
    if wrong:
        raise ValueError(
            f"Training cannot be continued on another base model: got {plain('; '.join(wrong), 400)}, expected the "
            f"model of its first {state['step']} steps. Connect that one, {advice}"
        )


def check_continues(state: Mapping, settings: TrainingSettings, shapes: Mapping[str, tuple]) -> None:
    """Raises ValueError when a checkpoint is of a training that these settings or this model do not continue."""
    then, now = dict(state["settings"]), settings_to_dict(settings)
    usual = settings_to_dict(TrainingSettings())  # of settings that an earlier version did not have
    then = {name: then.get(name, usual[name]) for name in now}
    changed = {name: (then[name], now[name]) for name in now if name not in _FREE and then[name] != now[name]}
    if changed:
        listed = ", ".join(f"{name} {shorten(new)} instead of {shorten(old)}" for name, (old, new) in changed.items())
        raise ValueError(
            f"Training cannot be continued with other settings: got {listed}, expected the same. Set them as they "
            f"were, give the training another name, or turn resume off."
        )
    stored = {name: tuple(tensor.shape) for name, tensor in state["parameters"].items()}
    wrong = sorted(name for name in stored.keys() | shapes.keys() if stored.get(name) != shapes.get(name))
    if wrong:
        raise ValueError(
            f"Training cannot be continued on this model: got other trained weights ({list_names(wrong, 3)}, "
            f"{len(wrong)} in all), expected those of the checkpoint. Connect the model that it was begun with, give "
            f"the training another name, or turn resume off."
        )


def _remove(paths) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
