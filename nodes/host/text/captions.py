"""Captions as the host's CONDITIONING, and what a MODEL says about them."""

import logging
import sys

import comfy.model_base
import torch
from comfy_api.feature_flags import supports_feature

from ....pixart.quoting import list_names, shorten
from ....pixart.text import PAD_ID, batch_captions, check_brackets, limit_text, truncate
from . import prompt_cache
from .t5 import T5_NAME

log = logging.getLogger(__name__)

BATCH_LIMIT = 4096  # the host's own for pictures
_SHOWN_NOTICES = 32
SIZE_KEYS = ("pixart_size", "pixart_ratio", "width", "height")


def pixart_config(model):
    """The PixArtConfig of a MODEL. Raises ValueError for other models."""
    config = getattr(model.model, "pixart_config", None)
    if config is None:
        kind = type(model.model)
        got = "ComfyUI's own PixArt" if kind is comfy.model_base.PixArt else kind.__name__
        raise ValueError(
            f"Not a PixArt model of this pack: got {got}, expected the output of Load PixArt Checkpoint. "
            f"Load the file with that, GGUF too, or disconnect the model and choose the caption length yourself."
        )
    return config


def encode_captions(clip, captions: list[str], caption_length: int, *, keep: bool = True, **extra) -> tuple[list, str]:
    """Encode captions as one conditioning whose batch they are, each cut to caption_length tokens.

    keep: in the cache of prompts. extra: goes into the conditioning's dict.
    Returns (CONDITIONING, what to tell the user).
    The states (B, L, D) are as long as the longest caption, with an "attention_mask" (B, L) bool, True = keep.
    Captions run through T5 one by one and unpadded: equal to a padded run under its mask, and less work.
    Raises ValueError when clip is no T5, and for more than BATCH_LIMIT captions.
    """
    if len(captions) > BATCH_LIMIT:
        raise ValueError(
            f"Too many captions: got {len(captions)}, expected at most {BATCH_LIMIT}, one for each picture of a batch. "
            f"Encode them in parts."
        )
    schedules, notices = [], []
    for index, caption in enumerate(captions):
        kept, cut = truncate(_tokenize(clip, caption), caption_length)
        notices.append(_describe_cut(clip, kept, cut, caption_length, f"Caption {index + 1}: " * (len(captions) > 1)))
        schedules.append(_encode(clip, kept, extra, keep))
    conditioning = []
    for entries in zip(*schedules, strict=True):  # one entry of every caption, more of them only with hooks
        states, mask = batch_captions([states for states, _ in entries])
        conditioning.append([states, {**entries[0][1], "attention_mask": mask}])
    more = [f"and {len(notices) - _SHOWN_NOTICES} more captions"] if len(notices) > _SHOWN_NOTICES else []
    return conditioning, "\n".join([*notices[:_SHOWN_NOTICES], *more])


def _encode(clip, tokens: list[tuple], extra: dict, keep: bool) -> list:
    """The host's conditioning of one caption, from disk where it has been encoded before."""
    key = prompt_cache.key_of(clip, tokens) if keep else None
    states = None if key is None else prompt_cache.read(key)
    if states is not None:
        return [[states, {"pooled_output": None, **extra}]]
    schedule = clip.encode_from_tokens_scheduled({T5_NAME: [tokens]}, add_dict=extra)
    if key is not None and len(schedule) == 1:
        prompt_cache.write(key, schedule[0][0])
    return schedule


def _tokenize(clip, caption: str) -> list[tuple]:
    """(token, weight) pairs of a caption with the end token last, without the padding some T5 loaders add."""
    caption, cut = limit_text(caption)
    if cut:
        log.warning("PixArt caption: %s", cut)
    check_brackets(caption)
    tokens = clip.tokenize(caption)
    if set(tokens) != {T5_NAME}:
        raise ValueError(
            f"Wrong text encoder: got the tokens of {list_names(tokens)}, expected those of {T5_NAME} alone. "
            f"Connect Load T5 Text Encoder, or Load CLIP with the type pixart."
        )
    pairs = [pair[:2] for pair in tokens[T5_NAME][0]]
    while len(pairs) > 1 and isinstance(pairs[-1][0], int) and pairs[-1][0] == PAD_ID:
        pairs.pop()
    return pairs


def count_tokens(clip, caption: str) -> int:
    """How many tokens a caption has before any is cut, the end token among them."""
    return len(_tokenize(clip, caption))


def _describe_cut(clip, kept: list, cut: list, caption_length: int, label: str) -> str:
    if not cut:
        return f"{label}{len(kept)} of {caption_length} tokens"
    text = clip.tokenizer.decode([token for token, _ in cut if isinstance(token, int)])
    notice = f"{label}{len(cut)} of {len(kept) + len(cut)} tokens cut (limit {caption_length}): {shorten(text, 200)}"
    log.warning("PixArt %s", notice)
    return notice


def check_caption_width(conditioning: list, config) -> None:
    """Raises ValueError when the captions have not the width that the model takes."""
    width = conditioning[0][0].shape[-1]
    if width != config.caption_channels:
        raise ValueError(
            f"Caption width mismatch: got {width}, expected {config.caption_channels}. Connect the T5 text encoder "
            f"of this PixArt model (T5-XXL for the released ones) to this node."
        )


def learned_null(positive: list, model) -> list:
    """The conditioning of the checkpoint's learned "no caption" under the masks of positive, which is not changed.

    Raises ValueError when the model has none.
    Source: PixArt-alpha, scripts/inference.py: y_embedding, with the prompt's mask for both halves.
    """
    pixart_config(model)
    if not model.model.has_null_caption:
        raise ValueError(
            "No learned null caption: got a PixArt file without y_embedding (diffusers layout), expected the original "
            "layout. Choose the mode 'empty', or load the original .pth."
        )
    return [[torch.zeros_like(states), {**extra, "pixart_null": True}] for states, extra in positive]


def sizes_of(conditioning: list | None) -> dict:
    """The size conditions of a conditioning's first entry, to give another the same."""
    first = conditioning[0][1] if conditioning else {}
    return {key: first[key] for key in SIZE_KEYS if key in first}


def show_text(hidden, text: str) -> None:
    """Show text on a node in the editor while the node runs; what it says at its end is in its output.

    hidden: the node's hidden inputs. Only the client that sent the prompt is told, and only one that understands such
    messages: others take them for pictures. Without a server nothing is shown.
    """
    server = sys.modules.get("server")  # imported by ComfyUI at its start; other programs have none
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    node_id, client = getattr(hidden, "unique_id", None), getattr(instance, "client_id", None)
    if node_id is None or client is None:
        return
    if supports_feature(instance.sockets_metadata, client, "supports_preview_metadata"):
        # Nodes 2.0 reads it as Markdown, which joins lines that do not end so.
        instance.send_progress_text(text.replace("\n", "  \n"), node_id, client)
