"""A MODEL as a file that other programs read."""

from pathlib import Path

import comfy.model_management
import comfy.utils
import torch

from ...pixart.checkpoint import NULL_CAPTION_KEY, expected_shapes
from ...pixart.weights.saving import lost_in_diffusers, save_checkpoint
from .folders import next_output
from .lora import PREFIX, SAVED_DTYPES, host_key, patched_weight
from .text.captions import pixart_config

# Layout -> (the file's ending, empty for a folder; the layout's name).
LAYOUTS = {
    "original (.safetensors)": (".safetensors", "original"),
    "original (.pth)": (".pth", "original"),
    "diffusers (.safetensors)": (".safetensors", "diffusers"),
    "diffusers (folder)": ("", "diffusers"),
}


def save_model(model, prefix: str, layout: str, dtype: str) -> Path:
    """Write a MODEL with the LoRAs and merges that are on it. layout: of LAYOUTS; dtype: of SAVED_DTYPES.

    prefix: see `folders.next_output`. Returns where it is. Raises ValueError when the model is no PixArt.
    """
    suffix, name = LAYOUTS[layout]
    path, config = next_output(prefix, suffix), pixart_config(model)
    names = [key for key in expected_shapes(config) if key != NULL_CAPTION_KEY or model.model.has_null_caption]
    patches = model.get_key_patches(PREFIX)
    bar, weights = comfy.utils.ProgressBar(len(names)), {}
    for key in names:
        comfy.model_management.throw_exception_if_processing_interrupted()
        own = SAVED_DTYPES[dtype] or _stored_dtype(patches[host_key(key)][0][0])
        weights[key] = patched_weight(patches, host_key(key), model.load_device).to("cpu", own)
        bar.update(1)
    save_checkpoint(path, weights, config, name, metadata=getattr(model.model, "pixart_stages", None))
    return path


def losses_of(model, layout: str) -> tuple[str, ...]:
    """What another program would drop of a MODEL that is saved in a layout, of LAYOUTS, in words."""
    return lost_in_diffusers(pixart_config(model)) if LAYOUTS[layout][1] == "diffusers" else ()


def _stored_dtype(weight) -> torch.dtype:
    """What a weight is kept in; fp16 for 8 bits, which hold no changed weight."""
    return weight.dtype if weight.dtype.itemsize > 1 else torch.float16
