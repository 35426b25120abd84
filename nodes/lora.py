"""LoRA nodes: put one onto a model, write it for other programs, and make one out of two models."""

from comfy_api.latest import io, ui

from ..pixart.lora import LAYOUTS
from .host.lora import SAVED_DTYPES, convert_lora, extract_lora, list_loras, load_lora
from .host.schema import choice_input, node_input, schema
from .host.text.captions import show_text

CATEGORY = "PixArt/lora"


def _lora_input():
    return node_input(
        io.Combo,
        "lora",
        options=list_loras(),
        tooltip="A file of models/loras or output/loras, or a PEFT folder there (with adapter_config.json in it).",
    )


def _prefix_input(name: str):
    return node_input(
        io.String,
        "filename_prefix",
        default=f"loras/{name}",
        tooltip="Name below the output folder; a number is added, and nothing is overwritten. What is saved in "
        "output/loras is offered by every LoRA loader after a refresh (R).",
    )


def _dtype_input(default: str):
    return choice_input(
        "dtype",
        SAVED_DTYPES,
        default=default,
        advanced=True,
        tooltip="Precision of the saved tensors. fp16 halves the file against fp32 at no visible loss.",
    )


class LoadLoRA(io.ComfyNode):
    """Put a LoRA of any layout onto a PixArt model."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtLoadLoRA",
            display_name="Load PixArt LoRA",
            category=CATEGORY,
            description="Put a LoRA, or another adapter that changes weights, onto a PixArt model, as saved by PEFT, "
            "LyCORIS, diffusers, the original's scripts, kohya, OneTrainer, SimpleTuner or ComfyUI. info names every "
            "key that did not fit.",
            search_aliases=["pixart lora", "lora loader", "dora", "lycoris", "loha", "lokr", "peft", "adapter"],
            inputs=[
                node_input(io.Model, "model", tooltip="The PixArt model; LoRAs that it has already stay on it."),
                _lora_input(),
                node_input(
                    io.Float,
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="1 is the LoRA as it was trained, 0 leaves the model as it is, below 0 takes it away.",
                ),
                node_input(
                    io.Float,
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=4096.0,
                    step=0.5,
                    optional=True,
                    advanced=True,
                    tooltip="Scale of the LoRA times its rank, where the file holds none or a wrong one. 0 takes it "
                    "from the file or the adapter_config.json beside it; info says from where.",
                ),
                node_input(
                    io.Boolean,
                    "strict",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Stop when a key of the file does not fit this model. Off: what fits is used, and info "
                    "says what is missing.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA, for any node."),
                io.String.Output(
                    display_name="info", tooltip="Kind, rank, alpha, how many keys fit, and every key that did not."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model, lora, strength=1.0, alpha=0.0, strict=False):
        patched, text = load_lora(model, lora, strength, alpha, strict)
        show_text(cls.hidden, text)
        return io.NodeOutput(patched, text, ui=ui.PreviewText(text))


class ConvertLoRA(io.ComfyNode):
    """Write a LoRA under another program's names."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtConvertLoRA",
            display_name="Convert PixArt LoRA",
            category=CATEGORY,
            description="Write a LoRA of any layout for another program. The change stays exactly the same.",
            search_aliases=["save lora", "export lora", "pixart lora", "peft", "kohya", "diffusers lora"],
            inputs=[
                _lora_input(),
                node_input(
                    io.Combo,
                    "layout",
                    options=list(LAYOUTS),
                    default=LAYOUTS[0],
                    tooltip="host: one file for ComfyUI's own LoRA loaders. peft: a folder for PEFT and diffusers. "
                    "kohya: one file with lora_unet_ names, for ComfyUI as well.",
                ),
                _prefix_input("pixart_lora"),
                _dtype_input("as it is"),
            ],
            outputs=[io.String.Output(display_name="info", tooltip="Where it was saved, and what it holds.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lora, layout, filename_prefix, dtype="as it is"):
        text = convert_lora(lora, layout, filename_prefix, dtype)
        show_text(cls.hidden, text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class ExtractLoRA(io.ComfyNode):
    """Make a LoRA out of a fine-tuned model and its base."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtExtractLoRA",
            display_name="Extract PixArt LoRA",
            category=CATEGORY,
            description="Save the difference of two PixArt models as a LoRA, by singular value decomposition: a "
            "fine-tuned model in a small file. Merges and LoRAs on the models count.",
            search_aliases=["extract lora", "svd", "difference", "subtract", "pixart lora"],
            inputs=[
                node_input(io.Model, "model", tooltip="The fine-tuned PixArt model."),
                node_input(io.Model, "base", tooltip="The model that it was made from."),
                node_input(
                    io.Int,
                    "rank",
                    default=32,
                    min=1,
                    max=1152,
                    tooltip="The highest rank of any weight: more is closer to the model, and a larger file.",
                ),
                node_input(
                    io.Float,
                    "energy",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.001,
                    tooltip="Of each weight, take only as much rank as holds this share of its difference (sum of "
                    "squares). 1 takes the full rank above everywhere; 0.95 leaves out what hardly counts.",
                ),
                _prefix_input("pixart_extracted"),
                node_input(
                    io.Boolean,
                    "biases",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Keep the differences of biases and modulation tables as well, whole: they are small.",
                ),
                _dtype_input("fp16"),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The base with the extracted LoRA on it, to compare."),
                io.String.Output(display_name="info", tooltip="Where it was saved, its rank, and how close it is."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, base, rank, energy, filename_prefix, biases=True, dtype="fp16"):
        patched, text = extract_lora(model, base, rank, energy, biases, filename_prefix, dtype)
        show_text(cls.hidden, text)
        return io.NodeOutput(patched, text, ui=ui.PreviewText(text))


NODES: list[type[io.ComfyNode]] = [LoadLoRA, ConvertLoRA, ExtractLoRA]
