"""Nodes that load and save models: checkpoints, diffusers folders, autoencoders, and what a loaded model is."""

from comfy_api.latest import io, ui

from ..pixart.stages.dit import T5_XXL_CHANNELS
from .host.decoder import list_consistency_decoders, load_consistency_vae
from .host.export import LAYOUTS, losses_of, save_model
from .host.folders import show_path
from .host.loading import (
    MODEL_DTYPES,
    VARIANTS,
    WEIGHTS,
    describe_model,
    list_checkpoints,
    list_pipelines,
    list_vaes,
    load_checkpoint,
    load_pipeline,
    load_vae,
    remarks_on,
)
from .host.lora import SAVED_DTYPES
from .host.schema import choice_input, node_input, schema, seed_input
from .host.text.captions import show_text
from .host.text.t5 import remark_on
from .host.weights.stages import BY_SIZE, STAGES, grow_model, list_dits, load_dit

CATEGORY = "PixArt/loaders"


def _variant_input():
    return choice_input(
        "variant",
        VARIANTS,
        advanced=True,
        tooltip="Which released PixArt the file is. auto reads it from the weights, the files around them and the "
        "name; PixArt Model Info shows by which sign. Choose it where auto is wrong.",
    )


def _dtype_input():
    return choice_input(
        "weight_dtype",
        MODEL_DTYPES,
        default="default",
        tooltip="Precision of the weights. default: as ComfyUI thinks best for the file and the device. fp8 halves "
        "the memory at a small loss; int8 too, and multiplies in 8 bits. With default, GGUF stays packed.",
    )


def _show(hidden, text: str):
    """Text on the node, and in its output; nothing where there is none."""
    show_text(hidden, text)
    return ui.PreviewText(text) if text else None


class LoadCheckpoint(io.ComfyNode):
    """Load a PixArt from a file."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtLoadCheckpoint",
            display_name="Load PixArt Checkpoint",
            category=CATEGORY,
            description="Load a PixArt-alpha or Sigma transformer from a file: the original .pth, safetensors in the "
            "original or diffusers layout, or what ComfyUI saved. The MODEL works with every node.",
            search_aliases=["pixart", "load pixart", "pixart sigma", "pixart alpha", "diffusion model", "unet loader"],
            inputs=[
                node_input(
                    io.Combo,
                    "checkpoint",
                    options=list_checkpoints(),
                    tooltip="A file of models/diffusion_models or models/checkpoints, "
                    "such as PixArt-XL-2-1024-MS.pth or PixArt-Sigma-XL-2-1024-MS.pth. GGUF and quantised files are "
                    "read, too.",
                ),
                _dtype_input(),
                _variant_input(),
                choice_input(
                    "weights",
                    WEIGHTS,
                    advanced=True,
                    tooltip="Of a training checkpoint that holds both: ema takes the averaged weights, which are "
                    "better pictures; model the raw ones. Files with one set ignore this.",
                ),
                node_input(
                    io.String,
                    "place",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Of a file that holds several models beside each other: the name of the one to take, such "
                    "as generator. Empty: as weights says; where that is not enough, an error lists the names.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The PixArt model, for any sampler.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, checkpoint, weight_dtype="default", variant=VARIANTS[0], weights=WEIGHTS[0], place=""):
        model = load_checkpoint(checkpoint, variant, weight_dtype, place.strip() or weights)
        return io.NodeOutput(model, ui=_show(cls.hidden, remarks_on(model)))


class LoadDiffusers(io.ComfyNode):
    """Load a whole PixArt pipeline from a diffusers folder."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtLoadDiffusers",
            display_name="Load PixArt Diffusers",
            category=CATEGORY,
            description="Load transformer, T5 and VAE of a PixArt folder in diffusers' layout, as on Hugging Face, "
            "sharded or not. A part that the folder lacks has no output.",
            search_aliases=[
                "pixart diffusers",
                "pixart sigma",
                "pixart alpha",
                "diffusers folder",
                "hugging face",
                "pipeline",
            ],
            inputs=[
                node_input(
                    io.Combo,
                    "folder",
                    options=list_pipelines(),
                    tooltip="A folder of models/diffusers, such as PixArt-XL-2-1024-MS/ with transformer/, "
                    "text_encoder/, tokenizer/ and vae/ in it.",
                ),
                _dtype_input(),
                _variant_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The PixArt model, for any sampler."),
                io.Clip.Output(display_name="clip", tooltip="The folder's T5 encoder."),
                io.Vae.Output(display_name="vae", tooltip="The folder's autoencoder."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, folder, weight_dtype="default", variant=VARIANTS[0]):
        model, clip, vae = load_pipeline(folder, variant, weight_dtype)
        remarks = [remarks_on(model), remark_on(clip)]
        return io.NodeOutput(model, clip, vae, ui=_show(cls.hidden, "\n".join(filter(None, remarks))))


class LoadVAE(io.ComfyNode):
    """Load an autoencoder and check that it is of the model's family."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtLoadVAE",
            display_name="Load PixArt VAE",
            category=CATEGORY,
            description="Load the autoencoder of PixArt from a file or a diffusers folder, also a tiny one (TAESD). "
            "With the model connected, one of the other family is refused: alpha needs SD 1.5's, Sigma SDXL's.",
            search_aliases=["pixart vae", "autoencoder", "sd-vae-ft-ema", "sdxl vae"],
            inputs=[
                node_input(
                    io.Combo,
                    "vae",
                    options=list_vaes(),
                    tooltip="A file of models/vae, or a vae/ folder of models/diffusers.",
                ),
                node_input(
                    io.Model,
                    "model",
                    optional=True,
                    tooltip="The PixArt model that the autoencoder is for. Connected, it is checked before sampling.",
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="The autoencoder, for any VAE node.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, vae, model=None):
        loaded, remark = load_vae(vae, model)
        return io.NodeOutput(loaded, ui=_show(cls.hidden, remark))


class StartFromDiT(io.ComfyNode):
    """Make a PixArt out of a class-conditional DiT."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtStartFromDiT",
            display_name="Start PixArt from DiT",
            category=CATEGORY,
            description="The first stage of PixArt's own training: a PixArt out of a DiT that was trained on ImageNet. "
            "It draws what the DiT draws without a class, and is to be trained on captions before it follows any.",
            search_aliases=["dit", "dit-xl-2", "imagenet", "from scratch", "adaln-single", "initialise"],
            inputs=[
                node_input(
                    io.Combo,
                    "dit",
                    options=list_dits(),
                    tooltip="DiT-XL-2-256x256.pt or -512x512.pt in models/diffusion_models or models/checkpoints, or a "
                    "DiT's folder in models/diffusers.",
                ),
                _dtype_input(),
                node_input(
                    io.Int,
                    "caption_width",
                    default=T5_XXL_CHANNELS,
                    min=1,
                    max=16384,
                    optional=True,
                    advanced=True,
                    tooltip="Width of the text encoder's states: 4096 of T5-XXL.",
                ),
                seed_input("Of the parts that read captions, which a DiT does not have.", advanced=True),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The PixArt, for Train PixArt.")],
        )

    @classmethod
    def execute(cls, dit, weight_dtype="default", caption_width=T5_XXL_CHANNELS, seed=0):
        return io.NodeOutput(load_dit(dit, weight_dtype, seed, caption_width))


class Grow(io.ComfyNode):
    """Bring a model to another size or family."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtGrow",
            display_name="Grow PixArt",
            category=CATEGORY,
            description="Bring a model to the next stage of its training: another size, size conditions, or Sigma with "
            "its longer captions. Untrained it draws what it drew, as far as the stage allows; then train it.",
            search_aliases=["resolution", "upscale model", "alpha to sigma", "kv compression", "256 to 512", "stage"],
            inputs=[
                node_input(io.Model, "model", tooltip="A PixArt; LoRAs and merges on it become part of the new one."),
                node_input(
                    io.Combo,
                    "stage",
                    options=list(STAGES),
                    default=BY_SIZE,
                    tooltip="A released model's size, positions, size conditions, tokens and autoencoder; kvcompress: "
                    "with keys and values compressed. size in pixels: that alone, with positions as they were.",
                ),
                node_input(
                    io.Int,
                    "size_px",
                    default=512,
                    min=64,
                    max=8192,
                    step=16,
                    tooltip="Side of the square that it is to be trained at, for 'size in pixels'.",
                ),
                seed_input(
                    "Of what begins by chance: size embedders, further tokens of the null caption.", advanced=True
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The grown model, for Train PixArt.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model, stage, size_px, seed=0):
        grown, text = grow_model(model, stage, size_px, seed)
        return io.NodeOutput(grown, ui=_show(cls.hidden, text))


class ModelInfo(io.ComfyNode):
    """Say what a PixArt model is."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtModelInfo",
            display_name="PixArt Model Info",
            category="PixArt/info",
            description="What the connected model is: variant, trained size, caption length, the VAE it needs, layers, "
            "precision, LoRAs, and by which signs that was found out.",
            search_aliases=["pixart info", "which model", "inspect", "details"],
            inputs=[node_input(io.Model, "model", tooltip="Any MODEL; a PixArt of this pack is described in full.")],
            outputs=[io.String.Output(display_name="info", tooltip="The same text, for other nodes.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model):
        text = describe_model(model)
        show_text(cls.hidden, text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class LoadConsistencyDecoder(io.ComfyNode):
    """Decode latents of PixArt-alpha by DALL-E 3's decoder."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtLoadConsistencyDecoder",
            display_name="Load PixArt Consistency Decoder",
            category="PixArt/loaders",
            description="A VAE that decodes by the consistency decoder of DALL-E 3: finer faces, letters and lines, "
            "for much more time and memory. For PixArt-alpha, whose latents are SD 1.5's.",
            search_aliases=["dall-e 3 decoder", "dalle", "consistency decoder", "openai vae", "consistencydecodervae"],
            inputs=[
                node_input(
                    io.Combo,
                    "decoder",
                    options=list_consistency_decoders(),
                    tooltip="The folder of openai/consistency-decoder in models/vae or models/diffusers, or its file.",
                ),
                node_input(io.Vae, "vae", tooltip="The normal VAE (sd-vae-ft-ema): encodes, and gives the precision."),
                seed_input("Of the noise that it decodes from: changes the finest details alone."),
                node_input(
                    io.Model, "model", optional=True, tooltip="Connected, a PixArt-Sigma is refused before sampling."
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="For VAE Decode, VAE Encode and their tiled versions.")],
        )

    @classmethod
    def execute(cls, decoder, vae, seed=0, model=None):
        return io.NodeOutput(load_consistency_vae(decoder, vae, seed, model))


AS_IT_IS = next(iter(SAVED_DTYPES))


class SaveCheckpoint(io.ComfyNode):
    """Write a PixArt model, with what is on it, in the layout of another program."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtSaveCheckpoint",
            display_name="Save PixArt Checkpoint",
            category="PixArt/loaders",
            description="Write the model, with its LoRAs and merges in it, as a checkpoint of the original layout or "
            "as diffusers keeps it. The file loads here, in the original's scripts, and in diffusers.",
            search_aliases=["convert checkpoint", "save model", "export diffusers", "bake lora", "merge lora"],
            is_output_node=True,
            inputs=[
                node_input(io.Model, "model", tooltip="A PixArt model; LoRAs and merges on it go into the file."),
                node_input(
                    io.String,
                    "filename_prefix",
                    default="diffusion_models/pixart",
                    tooltip="Folders and the start of the name, below ComfyUI's output folder.",
                ),
                node_input(
                    io.Combo,
                    "layout",
                    options=list(LAYOUTS),
                    default=list(LAYOUTS)[0],
                    tooltip="original: for ComfyUI and PixArt's own scripts. diffusers: for its pipelines; its layout "
                    "has no place for the learned null caption, which a single file keeps all the same.",
                ),
                choice_input(
                    "dtype",
                    SAVED_DTYPES,
                    default=AS_IT_IS,
                    tooltip="Precision of the file. as it is: that of the loaded weights, and fp16 for fp8.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file or folder is.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, filename_prefix, layout, dtype=AS_IT_IS):
        path = show_path(save_model(model, filename_prefix, layout, dtype))
        return io.NodeOutput(path, ui=_show(cls.hidden, "\n".join((path, *losses_of(model, layout)))))


NODES: list[type[io.ComfyNode]] = [
    LoadCheckpoint,
    LoadDiffusers,
    LoadVAE,
    StartFromDiT,
    Grow,
    ModelInfo,
    LoadConsistencyDecoder,
    SaveCheckpoint,
]
