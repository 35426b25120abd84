"""Nodes that keep encoded prompts in files."""

from comfy_api.latest import io, ui

from .host.embeddings import fingerprint_embeddings, list_embeddings, load_embeddings, save_embeddings
from .host.schema import node_input, schema
from .host.text import show_text

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


NODES: list[type[io.ComfyNode]] = [SavePromptEmbeddings, LoadPromptEmbeddings]
