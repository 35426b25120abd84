"""What graphs made for ComfyUI_ExtraModels need: its PixArt nodes are replaced by ours, values and links kept."""

from comfy_api.latest import io

from .host.replacements import FOREIGN_BASES, FOREIGN_RATIOS, Replacement
from .host.schema import node_input, schema
from .host.text.t5 import take_t5

CATEGORY = "PixArt/conditioning"
LARGEST_PX = 16384


class SizeCondition(io.ComfyNode):
    """Tell the model a size, in a conditioning of any text node."""

    @classmethod
    def define_schema(cls):
        side = {"default": 1024, "min": 8, "max": LARGEST_PX}
        return schema(
            node_id="PixArtSizeCondition",
            display_name="PixArt Size Condition",
            category=CATEGORY,
            description="Tell PixArt-alpha 1024 a picture size other than the latent's, in a conditioning of any text "
            "node. PixArt Text Encode has the same settings.",
            search_aliases=["pixart resolution conditioning", "size conditioning", "micro conditioning"],
            inputs=[
                node_input(io.Conditioning, "conditioning", tooltip="The encoded caption."),
                node_input(io.Int, "width", tooltip="Width in pixels that the model is given.", **side),
                node_input(io.Int, "height", tooltip="Height in pixels that the model is given.", **side),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="The caption with the size.")],
        )

    @classmethod
    def execute(cls, conditioning, width, height):
        size = {"pixart_size": (height, width), "pixart_ratio": height / width}
        return io.NodeOutput([[states, {**extra, **size}] for states, extra in conditioning])


class T5FromClip(io.ComfyNode):
    """Take the T5 out of a CLIP that holds several encoders."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtT5FromClip",
            display_name="T5 From CLIP",
            category="PixArt/loaders",
            description="The T5 of a CLIP that holds several encoders, as SD3's and FLUX's do, for PixArt: nothing is "
            "loaded twice.",
            search_aliases=["t5 from sd3 clip", "split clip", "extract t5"],
            inputs=[node_input(io.Clip, "clip", tooltip="A CLIP with T5 v1.1 XXL in it, such as SD3's.")],
            outputs=[io.Clip.Output(display_name="clip", tooltip="The T5 alone, for PixArt Text Encode.")],
        )

    @classmethod
    def execute(cls, clip):
        return io.NodeOutput(take_t5(clip))


# By the names that ComfyUI_ExtraModels gave its nodes, inputs (in the order of their widgets) and outputs.
# The two T5 nodes are not PixArt's alone, but without them its text node has nothing to read with.
MODELS = (list(FOREIGN_BASES),)
SCHEDULES = {"noise_schedule": (["linear", "squaredcos_cap_v2"],), "noise_schedule_vp": (["linear", "discrete"],)}
T5_CHOICES = {
    "t5v11_ver": (["xxl"],),
    "path_type": (["folder", "file"],),
    "dtype": (["default", "auto (comfy)", "FP32", "FP16", "BF16", "bnb8bit", "bnb4bit"],),
}
REPLACEMENTS = (
    Replacement(
        "PixArtCheckpointLoader",
        "PixArtLoadCheckpoint",
        widgets=("ckpt_name", "model"),
        inputs={"checkpoint": "ckpt_name"},
        others={"model": MODELS},
    ),
    Replacement(
        "PixArtCheckpointLoaderSimple",
        "PixArtLoadCheckpoint",
        widgets=("ckpt_name",),
        inputs={"checkpoint": "ckpt_name"},
    ),
    Replacement(
        "PixArtResolutionSelect",
        "PixArtResolution",
        widgets=("model", "ratio"),
        inputs={"base": "model", "ratio": "ratio"},
        values={"mode": "by ratio"},
        outputs=2,
        others={"model": MODELS, "ratio": (list(FOREIGN_RATIOS), {"default": "1.00"})},
    ),
    Replacement(
        "PixArtLoraLoader",
        "PixArtLoadLoRA",
        widgets=("lora_name", "strength"),
        inputs={"model": "model", "lora": "lora_name", "strength": "strength"},
    ),
    Replacement(
        "PixArtT5TextEncode",
        "PixArtTextEncode",
        widgets=("text",),
        inputs={"clip": "T5", "text": "text"},
        values={"caption_length": "120"},
    ),
    Replacement(
        "PixArtResolutionCond",
        "PixArtSizeCondition",
        widgets=("width", "height"),
        inputs={"conditioning": "cond", "width": "width", "height": "height"},
    ),
    Replacement(
        "PixArtControlNetCond",
        "PixArtControlNetApply",
        inputs={"positive": "cond"},
        others={"latent": ("LATENT",)},
    ),
    Replacement(
        "PixArtT5FromSD3CLIP",
        "PixArtT5FromClip",
        widgets=("padding",),
        inputs={"clip": "sd3_clip"},
        others={"padding": ("INT", {"default": 1, "min": 1, "max": 300})},
    ),
    Replacement(
        "PixArtDPMSampler",
        "KSampler",
        widgets=("seed", "control_after_generate", "steps", "cfg", "noise_schedule", "noise_schedule_vp"),
        inputs={name: name for name in ("model", "seed", "steps", "cfg", "positive", "negative", "latent_image")},
        values={"sampler_name": "pixart_dpm_solver", "scheduler": "pixart_uniform", "denoise": 1.0},
        others=SCHEDULES,
    ),
    Replacement(
        "T5v11Loader",
        "PixArtLoadT5",
        widgets=("t5v11_name", "t5v11_ver", "path_type", "device", "dtype"),
        inputs={"text_encoder": "t5v11_name"},
        others={**T5_CHOICES, "device": (["auto", "cpu", "gpu"], {"default": "cpu"})},
    ),
    Replacement("T5TextEncode", "PixArtTextEncode", widgets=("text",), inputs={"clip": "T5", "text": "text"}),
)

NODES: list[type[io.ComfyNode]] = [SizeCondition, T5FromClip]
