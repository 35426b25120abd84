"""Text nodes: the T5 encoder, captions, what stands in for a negative caption, and encoded prompts in files."""

import re

from comfy_api.latest import io, ui

from ..pixart.config import ALPHA_CAPTION_LENGTH, SIGMA_CAPTION_LENGTH
from ..pixart.quoting import shorten
from ..pixart.text import clean_prompt, limit_text
from .host.schema import choice_input, node_input, schema
from .host.text.captions import check_caption_width, encode_captions, learned_null, pixart_config, show_text, sizes_of
from .host.text.embeddings import fingerprint_embeddings, list_embeddings, load_embeddings, save_embeddings
from .host.text.t5 import (
    AUTO,
    DEVICES,
    find_text_encoder,
    find_tokenizer,
    list_text_encoders,
    list_tokenizers,
    load_t5,
    remark_on,
)

CAPTION_LENGTHS = ("auto", str(ALPHA_CAPTION_LENGTH), str(SIGMA_CAPTION_LENGTH), "custom")
CLEANING = ("off", "official")
NEGATIVE_MODES = ("empty", "learned null", "text")
PROMPT_WEIGHT = re.compile(r"\([^()]+:\s*[\d.]+\)")
SIZE_TIP = "0 leaves it to the latent, which is right unless you want to hint at another size. PixArt-alpha 1024 only."


def _caption_inputs(optional: bool) -> list:
    return [
        node_input(
            io.Combo,
            "caption_length",
            options=list(CAPTION_LENGTHS),
            default="auto",
            optional=optional,
            tooltip="Longest caption in tokens; what is longer is cut, and the node says what. auto: as the connected "
            "model was trained (120 for alpha, 300 for Sigma), 300 without one.",
        ),
        node_input(
            io.Int,
            "custom_length",
            default=ALPHA_CAPTION_LENGTH,
            min=1,
            max=4096,
            optional=True,
            advanced=True,
            tooltip="The caption length when caption_length is custom.",
        ),
        node_input(
            io.Combo,
            "clean_caption",
            options=list(CLEANING),
            default="off",
            optional=optional,
            tooltip="official: clean the text as PixArt-alpha's captions were (lower case, no links, HTML, brackets). "
            "With it, prompt weights such as (word:1.3) have no effect. Sigma was trained without.",
        ),
    ]


def _caption_length(choice: str, custom_length: int, config) -> int:
    if choice == "auto":
        return config.caption_length if config else SIGMA_CAPTION_LENGTH
    return custom_length if choice == "custom" else int(choice)


def _encode(clip, captions, cleaning, length_choice, custom_length, model, extra) -> tuple[list, str]:
    """Clean, cut and encode captions for a model (None: any). Returns (CONDITIONING, notice)."""
    config = None if model is None else pixart_config(model)
    length = _caption_length(length_choice, custom_length, config)
    limited = [limit_text(caption, cleaned=cleaning == "official") for caption in captions]
    captions, cuts = zip(*limited, strict=True)
    cleaned = [clean_prompt(caption) for caption in captions] if cleaning == "official" else captions
    conditioning, notice = encode_captions(clip, cleaned, length, **extra)
    notice += "".join(f"\n{cut}" for cut in dict.fromkeys(cuts) if cut)
    if config:
        check_caption_width(conditioning, config)
    if cleaning == "official" and any(map(PROMPT_WEIGHT.search, captions)):
        notice += "\nThe official cleaning has removed the prompt weights."
    if config is None and length_choice == "auto" and conditioning[0][0].shape[1] > ALPHA_CAPTION_LENGTH:
        notice += f"\nPixArt-alpha takes {ALPHA_CAPTION_LENGTH} tokens: connect the model, or choose the length."
    return conditioning, notice


def _size_condition(width: int, height: int, aspect_ratio: float) -> dict:
    if bool(width) != bool(height):
        raise ValueError(
            f"Incomplete size: got width {width} and height {height}, expected both or neither. "
            f"Set both, or 0 and 0 to leave the size to the latent."
        )
    size = {"pixart_size": (height, width)} if width else {}
    return {**size, "pixart_ratio": aspect_ratio} if aspect_ratio else size


class LoadT5(io.ComfyNode):
    """Load a T5 v1.1 encoder from a file or folder."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtLoadT5",
            display_name="Load T5 Text Encoder",
            category="PixArt/loaders",
            description="Load the T5 v1.1 text encoder of PixArt: a single file in any precision, or a folder as on "
            "Hugging Face, sharded or not. The output works with every text node.",
            search_aliases=[
                "pixart t5",
                "load t5",
                "t5 v1.1 xxl",
                "t5xxl",
                "text encoder",
                "load clip pixart",
            ],
            inputs=[
                node_input(
                    io.Combo,
                    "text_encoder",
                    options=list_text_encoders(),
                    tooltip="A file of models/text_encoders or models/clip, or a folder (ending in /) there or in "
                    "models/diffusers. The released PixArt models need T5 v1.1 XXL. GGUF, 8 bit and nf4 files stay "
                    "packed in memory; the node says how much they take.",
                ),
                choice_input(
                    "tokenizer",
                    list_tokenizers(),
                    default=AUTO,
                    advanced=True,
                    tooltip="auto: the tokenizer that lies with the folder, else ComfyUI's own T5 vocabulary, which "
                    "is right for every released model.",
                ),
                choice_input(
                    "device",
                    DEVICES,
                    advanced=True,
                    tooltip="cpu keeps the encoder out of the graphics memory: slower, but it leaves more for the "
                    "model.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="clip", tooltip="The text encoder, for any text node.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, text_encoder, tokenizer=AUTO, device=DEVICES[0]):
        path = find_text_encoder(text_encoder)
        clip = load_t5(path, find_tokenizer(tokenizer, path), device)
        remark = remark_on(clip)
        show_text(cls.hidden, remark)
        return io.NodeOutput(clip, ui=ui.PreviewText(remark) if remark else None)


class TextEncode(io.ComfyNode):
    """Encode a caption, or one per line, for PixArt."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtTextEncode",
            display_name="PixArt Text Encode",
            category="PixArt/conditioning",
            description="Encode a caption for PixArt as the original does: cut to the length the model was trained "
            "with, optionally cleaned, with a mask and the picture's size. ComfyUI's prompt weights work.",
            search_aliases=["pixart prompt", "clip text encode", "t5 encode", "caption"],
            inputs=[
                node_input(io.Clip, "clip", tooltip="The T5 encoder: Load T5 Text Encoder, or Load CLIP as pixart."),
                node_input(
                    io.String,
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The caption. PixArt understands whole sentences.",
                ),
                *_caption_inputs(optional=True),
                node_input(
                    io.Model,
                    "model",
                    optional=True,
                    tooltip="The PixArt model, for its caption length and to check that the encoder fits.",
                ),
                node_input(
                    io.Boolean,
                    "batch_lines",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Every line is a caption of its own, for one picture of the batch each.",
                ),
                *_size_inputs(),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="The encoded caption.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        clip,
        text,
        caption_length="auto",
        custom_length=ALPHA_CAPTION_LENGTH,
        clean_caption="off",
        model=None,
        batch_lines=False,
        width=0,
        height=0,
        aspect_ratio=0.0,
    ):
        captions = [line for line in text.splitlines() if line.strip()] or [""] if batch_lines else [text]
        extra = _size_condition(width, height, aspect_ratio)
        conditioning, notice = _encode(clip, captions, clean_caption, caption_length, custom_length, model, extra)
        show_text(cls.hidden, notice)
        return io.NodeOutput(conditioning, ui=ui.PreviewText(notice))


def _size_inputs() -> list:
    limits = {"default": 0, "min": 0, "max": 16384, "step": 8, "optional": True, "advanced": True}
    return [
        node_input(io.Int, "width", tooltip=f"Width in pixels that the model is given. {SIZE_TIP}", **limits),
        node_input(io.Int, "height", tooltip=f"Height in pixels that the model is given. {SIZE_TIP}", **limits),
        node_input(
            io.Float,
            "aspect_ratio",
            default=0.0,
            min=0.0,
            max=16.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="Height / width that the model is given; 0 takes it from the size. The original gives the nominal "
            "ratio that PixArt Resolution puts out.",
        ),
    ]


class Negative(io.ComfyNode):
    """Make the negative conditioning: an empty caption, the learned null, or a text."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtNegative",
            display_name="PixArt Negative",
            category="PixArt/conditioning",
            description="The negative side of the guidance. empty: T5's reading of no text (diffusers' way). learned "
            "null: the checkpoint's own, as long as the positive caption (the original's way). text: what to avoid.",
            search_aliases=["pixart negative prompt", "null caption", "unconditional", "empty prompt"],
            inputs=[
                node_input(
                    io.Combo,
                    "mode",
                    options=list(NEGATIVE_MODES),
                    default=NEGATIVE_MODES[0],
                    tooltip="empty and text need clip. learned null needs positive and model, and a file that holds "
                    "it: the original .pth of PixArt-alpha and Sigma do, diffusers files do not.",
                ),
                node_input(io.Clip, "clip", optional=True, tooltip="The T5 encoder, for the modes empty and text."),
                node_input(
                    io.Conditioning,
                    "positive",
                    optional=True,
                    tooltip="The positive caption: learned null takes its length and mask, the other modes its size.",
                ),
                node_input(
                    io.Model, "model", optional=True, tooltip="The PixArt model, for learned null and caption length."
                ),
                node_input(
                    io.String,
                    "text",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    optional=True,
                    tooltip="What the picture should not show; only for the mode text.",
                ),
                *_caption_inputs(optional=True),
            ],
            outputs=[io.Conditioning.Output(display_name="negative", tooltip="The negative conditioning.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        mode,
        clip=None,
        positive=None,
        model=None,
        text="",
        caption_length="auto",
        custom_length=ALPHA_CAPTION_LENGTH,
        clean_caption="off",
    ):
        if mode == "learned null":
            _require(mode, positive=positive, model=model)
            return io.NodeOutput(learned_null(positive, model))
        _require(mode, clip=clip)
        captions = [text if mode == "text" else ""]
        extra = sizes_of(positive)
        conditioning, notice = _encode(clip, captions, clean_caption, caption_length, custom_length, model, extra)
        show_text(cls.hidden, notice)
        return io.NodeOutput(conditioning, ui=ui.PreviewText(notice))


def _require(mode: str, **inputs) -> None:
    missing = [name for name, value in inputs.items() if value is None]
    if missing:
        raise ValueError(
            f"Not connected: got no {' and no '.join(missing)}, expected it for the mode {shorten(mode)}. Connect "
            f"{' and '.join(missing)}, or choose another mode."
        )


CATEGORY = "PixArt/conditioning"


class SavePromptEmbeddings(io.ComfyNode):
    """Write an encoded prompt to a file."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtSavePromptEmbeddings",
            display_name="Save Prompt Embeddings",
            category=CATEGORY,
            description="Write an encoded prompt to a file in the output folder. A graph that loads it needs no T5, "
            "which saves its gigabytes of memory.",
            search_aliases=["save conditioning", "save prompt", "prompt cache", "t5 embeddings"],
            inputs=[
                node_input(io.Conditioning, "conditioning", tooltip="The output of a text node."),
                node_input(
                    io.String,
                    "filename_prefix",
                    default="embeds/prompt",
                    tooltip="Name below the output folder; a number is added, and nothing is overwritten.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The file, as Load Prompt Embeddings lists it.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, conditioning, filename_prefix="embeds/prompt"):
        name = save_embeddings(conditioning, filename_prefix)
        show_text(cls.hidden, f"Saved {name}")
        return io.NodeOutput(name, ui=ui.PreviewText(f"Saved {name}"))


class LoadPromptEmbeddings(io.ComfyNode):
    """Read an encoded prompt from a file."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtLoadPromptEmbeddings",
            display_name="Load Prompt Embeddings",
            category=CATEGORY,
            description="Read a prompt that Save Prompt Embeddings wrote: the graph runs with no text encoder at all.",
            search_aliases=["load conditioning", "load prompt", "prompt cache", "t5 embeddings"],
            inputs=[
                node_input(
                    io.Combo,
                    "embeddings",
                    options=list_embeddings(),
                    tooltip="A file in ComfyUI's output or input folder. Press R after saving one.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="The prompt, as it was saved.")],
        )

    @classmethod
    def fingerprint_inputs(cls, embeddings=""):
        return fingerprint_embeddings(embeddings)

    @classmethod
    def execute(cls, embeddings):
        return io.NodeOutput(load_embeddings(embeddings))


NODES: list[type[io.ComfyNode]] = [LoadT5, TextEncode, Negative, SavePromptEmbeddings, LoadPromptEmbeddings]
