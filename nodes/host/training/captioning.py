"""Captions by a vision-language model of the host's folders, under its memory management."""

from collections.abc import Callable, Sequence
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch

from ....pixart.encoders.captioner import (
    DESCRIBE_CAPTION,
    Captioner,
    CaptionSettings,
    fill_prompt,
    is_captioner_folder,
    load_captioner,
)
from ..folders import find_folder, find_folders
from ..loading import DTYPES
from ..pictures import to_pil

KINDS = ("LLM", "diffusers", "text_encoders")
PRECISIONS = ("default", "fp32", "bf16", "fp16")
_PROMPT_TOKENS = 1024  # the picture's 576 of LLaVA and the words

# The host has no folder of its own for language models; a path of the user's stays.
folder_paths.add_model_folder_path(KINDS[0], str(Path(folder_paths.models_dir, KINDS[0])))


def list_captioners() -> list[str]:
    """What PixArt Caption Images offers."""
    return list(find_folders(KINDS, is_captioner_folder))


def caption_images(
    images: Sequence[torch.Tensor],
    model: str,
    prompt: str,
    captions: Sequence[str],
    settings: CaptionSettings,
    batch_size: int,
    precision: str,
) -> list[str]:
    """One caption for each picture of some IMAGEs.

    model: of list_captioners. prompt: empty for the official one. captions: short ones for its {}, one for each
    picture, one for all, or none. precision: of PRECISIONS. Raises FileNotFoundError and ValueError.
    """
    pictures = [picture for image in images for picture in to_pil(image)]
    shorts = _share_out(captions, len(pictures))
    captioner = load_captioner(find_folder(KINDS, is_captioner_folder, model), DTYPES[precision])
    holder = torch.nn.Module()  # the host sets `device` on what it moves, which the model's own class forbids
    holder.network = captioner.model
    patcher = comfy.model_patcher.ModelPatcher(
        holder,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    memory = _cache_bytes(captioner, settings.max_tokens) * min(batch_size, len(pictures))
    comfy.model_management.load_models_gpu([patcher], memory_required=memory, force_full_load=True)
    bar = comfy.utils.ProgressBar(len(pictures) * settings.max_tokens)
    texts = []
    for start in range(0, len(pictures), batch_size):
        batch = slice(start, start + batch_size)
        prompts = [fill_prompt(prompt.strip() or DESCRIBE_CAPTION, short) for short in shorts[batch]]
        on_token = _watch(bar, start * settings.max_tokens, len(prompts))
        texts += captioner(pictures[batch], prompts, settings, on_token)
        bar.update_absolute(len(texts) * settings.max_tokens)
    return texts


def _watch(bar, done: int, step: int) -> Callable[[], None]:
    """Moves the bar by a token of each picture, and ends the work when the user interrupts."""
    written = 0

    def on_token() -> None:
        nonlocal written
        comfy.model_management.throw_exception_if_processing_interrupted()
        written += step
        bar.update_absolute(done + written)

    return on_token


def _share_out(captions: Sequence[str], count: int) -> list[str]:
    if len(captions) in (0, 1):
        return [*captions, *[""] * (1 - len(captions))] * count
    if len(captions) != count:
        raise ValueError(
            f"Wrong number of short captions: got {len(captions)}, expected {count}, one for each picture, or 1 for "
            f"all. Connect as many, or none."
        )
    return list(captions)


def _cache_bytes(captioner: Captioner, max_tokens: int) -> int:
    """What the keys and values of one answer take at the most."""
    config = getattr(captioner.model.config, "text_config", captioner.model.config)
    layers, width = getattr(config, "num_hidden_layers", 32), getattr(config, "hidden_size", 4096)
    return 2 * layers * width * (max_tokens + _PROMPT_TOKENS) * captioner.model.dtype.itemsize
