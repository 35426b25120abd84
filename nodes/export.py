"""The node that saves a PixArt model for other programs."""

from comfy_api.latest import io, ui

from .host.export import LAYOUTS, save_model
from .host.lora import DTYPES
from .host.schema import choice_input, node_input, schema
from .host.text import show_text

AS_IT_IS = next(iter(DTYPES))


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
                    DTYPES,
                    default=AS_IT_IS,
                    tooltip="Precision of the file. as it is: that of the loaded weights, and fp16 for fp8.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file or folder is.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, filename_prefix, layout, dtype=AS_IT_IS):
        path = str(save_model(model, filename_prefix, layout, dtype))
        show_text(cls.hidden, path)
        return io.NodeOutput(path, ui=ui.PreviewText(path))


NODES: list[type[io.ComfyNode]] = [SaveCheckpoint]
