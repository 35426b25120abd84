"""What a training begins with, as MODELs: a PixArt out of a DiT, and one grown to another size."""

from pathlib import Path

import torch

from ....pixart.checkpoint import NULL_CAPTION_KEY, expected_shapes
from ....pixart.stages.dit import is_dit_folder, read_dit
from ....pixart.stages.growth import GROWTHS, describe, grow, grown_config
from ....pixart.stages.records import with_stage
from ..denoiser.model import make_patcher
from ..folders import find_file, find_folder, find_folders, list_files
from ..loading import CHECKPOINT_KINDS, make_model
from ..lora import PREFIX, host_key, patched_weight
from ..text.captions import pixart_config

BY_SIZE = "size in pixels"
STAGES = (BY_SIZE, *GROWTHS)
_FOLDERS = ("diffusers",)


def list_dits() -> list[str]:
    """Files that may be a DiT, and diffusers folders that are one."""
    return [*find_folders(_FOLDERS, _is_dit), *list_files(CHECKPOINT_KINDS)]


def load_dit(name: str, dtype: str, seed: int, caption_channels: int):
    """The MODEL of a PixArt out of one of list_dits. dtype: of DTYPES. See stages.dit.read_dit."""
    place = find_folder(_FOLDERS, _is_dit, name) if name.endswith("/") else find_file(CHECKPOINT_KINDS, name)
    return make_model(read_dit(place, seed=seed, caption_channels=caption_channels), dtype)


def grow_model(model, stage: str, size_px: int, seed: int = 0):
    """A MODEL of its own, grown from the given one with the LoRAs and merges that are on it.

    stage: of STAGES; size_px: for BY_SIZE. seed: of what begins by chance. Returns (MODEL, what was done, in words).
    Raises ValueError for another model and for a size that cannot be.
    """
    config, growth = pixart_config(model), str(size_px) if stage == BY_SIZE else stage
    grown = grown_config(config, growth)  # refuses before anything is copied
    names = [name for name in expected_shapes(config) if name != NULL_CAPTION_KEY or model.model.has_null_caption]
    patches, weights = model.get_key_patches(PREFIX), {}
    for name in names:
        stored = patches[host_key(name)][0][0]
        own = stored.dtype if stored.dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32
        weights[name] = patched_weight(patches, host_key(name), torch.device("cpu")).to(own)
    line = f"grown from {describe(config)} to {describe(grown)} ({growth})"
    made = make_patcher(grow(weights, config, grown, seed), grown)
    made.model.pixart_stages = with_stage(getattr(model.model, "pixart_stages", {}), line)
    return made, line


def _is_dit(folder: Path) -> bool:
    inner = folder / "transformer"
    return is_dit_folder(inner if inner.is_dir() else folder)
