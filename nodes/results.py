"""Nodes at the end of a graph: compare pictures on a sheet, and log what made them."""

import json

from comfy_api.latest import io, ui

from ..pixart.drawing.axes import Axis, Grid, parse_axis
from ..pixart.tracking.weights_and_biases import OFF, WANDB_MODES
from .host.pictures import draw_grid, draw_sheet
from .host.run_log import log_runs, time_model
from .host.schema import choice_input, node_input, schema
from .host.server.users import current_user

COMPARE_CATEGORY = "PixArt/compare"
GridType = io.Custom("PIXART_GRID")
VALUES_TIP = (
    "One value on each line; a single line is split at commas. Numbers become numbers, true and false switches, and "
    "the rest texts: names of files, samplers and schedulers, or whole prompts."
)


def _name_input(name: str, default: str, where: str):
    tooltip = f"What varies {where}; it stands in the headings."
    return node_input(io.String, name, default=default, optional=True, tooltip=tooltip)


class CompareAxes(io.ComfyNode):
    """Run the rest of the graph once for every combination of two lists of settings."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtCompareAxes",
            display_name="PixArt Compare Axes",
            category=COMPARE_CATEGORY,
            description="Run the rest of the graph once for every combination of values. Link x and y to the inputs "
            "that are to vary: steps, cfg, sampler_name, strength_model, a file's name, a prompt. PixArt Compare "
            "Sheet shows the pictures as a table.",
            search_aliases=["xy plot", "xyz plot", "grid", "compare settings", "ablation", "sweep"],
            inputs=[
                node_input(io.String, "x_values", multiline=True, default="8, 14, 20", tooltip=VALUES_TIP),
                node_input(
                    io.String,
                    "y_values",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip=f"{VALUES_TIP} Empty: one row.",
                ),
                _name_input("x_name", "steps", "from left to right"),
                _name_input("y_name", "", "from top to bottom"),
            ],
            outputs=[
                io.AnyType.Output(display_name="x", is_output_list=True, tooltip="The value of x, for any input."),
                io.AnyType.Output(display_name="y", is_output_list=True, tooltip="The value of y, for any input."),
                io.String.Output(display_name="label", is_output_list=True, tooltip="The combination as a text."),
                GridType.Output(display_name="grid", tooltip="The table's headings, for PixArt Compare Sheet."),
            ],
        )

    @classmethod
    def execute(cls, x_values, y_values="", x_name="", y_name=""):
        y = parse_axis(y_name, y_values) if y_values.strip() else Axis("", (None,))
        grid = Grid(parse_axis(x_name, x_values), y)
        x_list, y_list = (list(values) for values in zip(*grid.cells(), strict=True))
        return io.NodeOutput(x_list, y_list, grid.labels(), grid)


class CompareSheet(io.ComfyNode):
    """Put all pictures of a comparison on one labelled sheet."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtCompareSheet",
            display_name="PixArt Compare Sheet",
            category=COMPARE_CATEGORY,
            description="All pictures on one sheet in even cells: as a table with the headings of PixArt Compare "
            "Axes, or with a label under each, such as the style's name.",
            search_aliases=["contact sheet", "image grid", "xy plot", "montage", "labelled grid"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                node_input(io.Image, "images", tooltip="The pictures, as many runs as the graph made."),
                node_input(GridType, "grid", optional=True, tooltip="From PixArt Compare Axes: draws a table."),
                node_input(
                    io.String,
                    "labels",
                    optional=True,
                    force_input=True,
                    tooltip="Without grid: a text for each picture, such as the style output of PixArt Style.",
                ),
                node_input(
                    io.Int,
                    "columns",
                    default=0,
                    min=0,
                    max=100,
                    optional=True,
                    tooltip="Without grid: pictures in a row; 0 makes the sheet as square as it can be.",
                ),
                node_input(io.String, "title", default="", optional=True, tooltip="With grid: a line above the table."),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="The sheet, for Save Image.")],
        )

    @classmethod
    def execute(cls, images, grid=None, labels=None, columns=(0,), title=("",)):
        if grid:
            sheet = draw_grid(images, grid[0].y.headings(), grid[0].x.headings(), title[0])
        else:
            sheet = draw_sheet(images, labels or [], columns[0])
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet, cls=cls))


INFO_CATEGORY = "PixArt/info"
TimerType = io.Custom("PIXART_TIMER")


def _log_input(name: str, tooltip: str):
    return node_input(io.String, name, optional=True, force_input=True, tooltip=tooltip)


class RunTimer(io.ComfyNode):
    """Measure the sampling with a model."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtRunTimer",
            display_name="PixArt Run Timer",
            category=INFO_CATEGORY,
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
            category=INFO_CATEGORY,
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
                _log_input("prompt", "In place of the prompt found in the graph, such as PixArt Style's."),
                _log_input("negative", "In place of the negative found in the graph."),
                _log_input("note", "Any text to keep with the run, such as a label."),
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
    def fingerprint_inputs(cls, **_):
        return current_user()

    @classmethod
    def execute(cls, images, folder, wandb=(OFF,), timer=(None,), prompt=(), negative=(), note=(), hash_files=(True,)):
        given = {"prompt": prompt, "negative": negative, "note": note}
        entries, shown = log_runs(images, folder[0], cls.hidden, given, timer[0], wandb[0], hash_files[0])
        return io.NodeOutput(images, [json.dumps(entry, ensure_ascii=False) for entry in entries], ui=shown)


NODES: list[type[io.ComfyNode]] = [CompareAxes, CompareSheet, RunTimer, RunLog]
