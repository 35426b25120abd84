"""Nodes that compare: axes of settings, one picture for each combination, and the sheet of all."""

from comfy_api.latest import io, ui

from ..pixart.comparison import Axis, Grid, parse_axis
from .host.pictures import draw_grid, draw_sheet
from .host.schema import node_input, schema

CATEGORY = "PixArt/compare"
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
            category=CATEGORY,
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
            category=CATEGORY,
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


NODES: list[type[io.ComfyNode]] = [CompareAxes, CompareSheet]
