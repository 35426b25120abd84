"""The captioning node: what pictures show, in many words."""

from comfy_api.latest import io

from ..pixart.captioner import DESCRIBE, DESCRIBE_CAPTION, CaptionSettings
from .host.caption import PRECISIONS, caption_images, list_captioners
from .host.schema import choice_input, node_input, schema

USUAL = CaptionSettings()


class CaptionImages(io.ComfyNode):
    """Describe pictures by a vision-language model."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtCaptionImages",
            display_name="PixArt Caption Images",
            category="PixArt/training",
            description="Describe pictures in detail with LLaVA or another vision-language model, as PixArt's own "
            "training captions were made. The captions go to PixArt Dataset From Images, or back into a prompt.",
            search_aliases=["llava", "vlm", "image to text", "auto caption", "interrogate", "describe image"],
            is_input_list=True,
            inputs=[
                node_input(io.Image, "images", tooltip="Pictures of any sizes."),
                node_input(
                    io.Combo,
                    "model",
                    options=list_captioners(),
                    tooltip="A folder of models/LLM as transformers saves it, such as llava-1.5-7b-hf.",
                ),
                node_input(
                    io.String,
                    "prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip=f"What to ask; {{}} stands for the short caption. Empty asks as PixArt's authors did: "
                    f"{DESCRIBE}; or with a short caption: {DESCRIBE_CAPTION}.",
                ),
                node_input(
                    io.String,
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="Short captions that the pictures have already: one for each, or one for all.",
                ),
                node_input(
                    io.Int,
                    "max_tokens",
                    default=USUAL.max_tokens,
                    min=1,
                    max=8192,
                    optional=True,
                    tooltip="Where a caption is cut that does not end by itself.",
                ),
                node_input(
                    io.Float,
                    "temperature",
                    default=USUAL.temperature,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    tooltip="0 always takes the likeliest word; more varies the words.",
                ),
                node_input(
                    io.Int,
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    optional=True,
                    tooltip="Other words for the same picture, where the temperature is above 0.",
                ),
                node_input(
                    io.Int,
                    "batch_size",
                    default=4,
                    min=1,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Pictures at once; more is faster and takes more memory.",
                ),
                choice_input(
                    "precision",
                    PRECISIONS,
                    advanced=True,
                    tooltip="Of the weights. default: as they are in the folder.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="captions", is_output_list=True, tooltip="A caption for each picture, whole."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        images,
        model,
        prompt=("",),
        captions=(),
        max_tokens=(USUAL.max_tokens,),
        temperature=(USUAL.temperature,),
        seed=(0,),
        batch_size=(4,),
        precision=PRECISIONS[:1],
    ):
        settings = CaptionSettings(max_tokens[0], temperature[0], seed[0])
        texts = caption_images(images, model[0], prompt[0], captions, settings, batch_size[0], precision[0])
        return io.NodeOutput(texts)


NODES: list[type[io.ComfyNode]] = [CaptionImages]
