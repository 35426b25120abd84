"""The logging nodes: what made a picture, kept with it."""

import json

from comfy_api.latest import io

from ..pixart.run_log import OFF, WANDB_MODES
from .host.log import log_runs, time_model
from .host.schema import choice_input, node_input, schema

CATEGORY = "PixArt/info"
TimerType = io.Custom("PIXART_TIMER")


def _text_input(name: str, tooltip: str):
    return node_input(io.String, name, optional=True, force_input=True, tooltip=tooltip)


class RunTimer(io.ComfyNode):
    """Measure the sampling with a model."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtRunTimer",
            display_name="PixArt Run Timer",
            category=CATEGORY,
            description="Measures how long sampling with this model takes, for PixArt Run Log. The pictures stay the "
            "same.",
            search_aliases=["benchmark", "time per step", "speed", "stopwatch"],
            inputs=[node_input(io.Model, "model", tooltip="The model, after all patches.")],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler."),
                TimerType.Output(display_name="timer", tooltip="For PixArt Run Log."),
            ],
        )

    @classmethod
    def execute(cls, model):
        return io.NodeOutput(*time_model(model))


class RunLog(io.ComfyNode):
    """Save pictures with what made them."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtRunLog",
            display_name="PixArt Run Log",
            category=CATEGORY,
            description="Saves pictures and a line of JSON with what made them: prompt, negative, seed, solver, steps, "
            "guidance, size, and the files of models and LoRAs with their hashes, read off the graph. On request also "
            "in Weights & Biases.",
            search_aliases=["wandb", "weights and biases", "experiment log", "metadata", "save image", "jsonl"],
            is_input_list=True,
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                node_input(io.Image, "images", tooltip="The pictures; every run of the graph gets a line of its own."),
                node_input(
                    io.String,
                    "folder",
                    default="pixart_log",
                    tooltip="A folder in ComfyUI's output folder; each run adds its pictures and a line to log.jsonl.",
                ),
                choice_input(
                    "wandb",
                    WANDB_MODES,
                    default=OFF,
                    tooltip="Weights & Biases: off, offline (only written into the folder), or online. Nothing is sent "
                    "unless it is online.",
                ),
                node_input(TimerType, "timer", optional=True, tooltip="From PixArt Run Timer: seconds per step."),
                _text_input("prompt", "In place of the prompt found in the graph, such as PixArt Style's."),
                _text_input("negative", "In place of the negative found in the graph."),
                _text_input("note", "Any text to keep with the run, such as a label."),
                node_input(
                    io.Boolean,
                    "hash_files",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Tell models and LoRAs by the SHA-256 of their files; each is read once.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="The same pictures."),
                io.String.Output(
                    display_name="entry", is_output_list=True, tooltip="The line of the log, as JSON, for each run."
                ),
            ],
        )

    @classmethod
    def execute(cls, images, folder, wandb=(OFF,), timer=(None,), prompt=(), negative=(), note=(), hash_files=(True,)):
        given = {"prompt": prompt, "negative": negative, "note": note}
        entries, shown = log_runs(images, folder[0], cls.hidden, given, timer[0], wandb[0], hash_files[0])
        return io.NodeOutput(images, [json.dumps(entry, ensure_ascii=False) for entry in entries], ui=shown)


NODES: list[type[io.ComfyNode]] = [RunTimer, RunLog]
