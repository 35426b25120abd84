"""Compare settings on a running ComfyUI: one picture for each combination of values, on one labelled sheet.

    python -m pixart compare workflow_api.json --x 7.steps=8,14,20 --y 7.cfg=3,4.5 --output steps.png
    python -m pixart compare workflow_api.json --x 7.sampler_name=euler,pixart_sa_solver --y 4.text=@prompts.txt

The workflow is in API format (the editor's menu: Workflow, Export (API)); 7.steps is the input `steps` of its node 7.
Values are between commas, or with @ the lines of a file. In the graph, PixArt Compare Axes does the same.
"""

import argparse
import copy
import io
import sys
from pathlib import Path

from PIL import Image

from ..drawing.axes import Axis, Grid, parse_axis
from ..drawing.sheets import comparison_grid, labelled_sheet
from ..files.atomic import write_atomically
from ..files.documents import load_json
from ..quoting import list_names, plain, shorten
from .console import make_parser
from .server import ComfyServer


def read_workflow(path: Path) -> dict:
    """A workflow in API format. Raises ValueError for another file, the editor's own format among them."""
    try:
        nodes = load_json(path)
    except ValueError as error:
        raise ValueError(
            f"Workflow is not JSON: got {shorten(path.name)} ({shorten(error, 200)}), expected an exported workflow."
        ) from error
    if not isinstance(nodes, dict) or not all(isinstance(n, dict) and "class_type" in n for n in nodes.values()):
        raise ValueError(
            f"Workflow is not in API format: got {shorten(path.name)}, expected nodes with a class_type. In the "
            f"editor's menu choose Workflow, Export (API)."
        )
    return nodes


def parse_target(text: str, workflow: dict) -> tuple[str, str, Axis]:
    """`7.steps=8,14` -> (node, input, axis). Raises ValueError for a node or input that the workflow has not."""
    place, equals, values = text.partition("=")
    node, dot, name = place.strip().partition(".")
    if not equals or not dot:
        raise ValueError(
            f"Axis is not understood: got {shorten(text)}, expected NODE.INPUT=VALUES such as 7.steps=8,14,20."
        )
    inputs = workflow.get(node, {}).get("inputs", {})
    if name not in inputs:
        known = list_names(inputs if node in workflow else workflow, 64)
        raise ValueError(
            f"No such input: got {plain(place)}, expected one of {known}. Look them up in the workflow's file."
        )
    if values.startswith("@"):
        values = Path(values[1:]).read_text(encoding="utf-8-sig")
        values = values if "\n" in values.strip() else f"'{values.strip()}'"  # one line of a file is one value
    axis = parse_axis(name, values)
    # Texts speak for themselves; numbers do not.
    return node, name, Axis("", axis.values) if all(isinstance(value, str) for value in axis.values) else axis


def fill(workflow: dict, targets: list[tuple[str, str]], values: tuple) -> dict:
    """A copy of the workflow with the values at their inputs, in place of what was there or was linked."""
    filled = copy.deepcopy(workflow)
    for (node, name), value in zip(targets, values, strict=True):
        filled[node]["inputs"][name] = value
    return filled


def make_cell(server: ComfyServer, workflow: dict, path: Path | None, timeout_s: float) -> Image.Image:
    """The workflow's picture, several as one; kept at `path` and not made again when it is there."""
    if path is not None and path.is_file():
        return Image.open(path)
    pictures = [Image.open(io.BytesIO(c)) for c in server.images(server.wait(server.queue(workflow), timeout_s))]
    if not pictures:
        raise ValueError("No picture: got none from the workflow, expected a Save Image node in it. Add one.")
    cell = pictures[0] if len(pictures) == 1 else labelled_sheet(pictures, [])
    if path is not None:
        write_atomically(path, lambda temporary: cell.save(temporary, "PNG"))
    return cell


def main(options: argparse.Namespace) -> None:
    """Writes the sheet. Raises FileExistsError unless --force."""
    from tqdm import tqdm

    if options.output.exists() and not options.force:
        raise FileExistsError(
            f"Exists already: got {shorten(str(options.output), 300)}, expected a new name. Use --force to replace it."
        )
    workflow = read_workflow(options.workflow)
    axes = [parse_target(text, workflow) for text in (options.x, options.y) if text]
    places = [(node, name) for node, name, _ in axes]
    grid = Grid(axes[0][2], axes[1][2] if len(axes) > 1 else Axis("", (None,)))
    server = ComfyServer(options.server)
    cells = []
    for number, (values, label) in enumerate(tqdm(list(zip(grid.cells(), grid.labels(), strict=True)), unit="picture")):
        path = options.cells / f"{number:04}.png" if options.cells else None
        filled = fill(workflow, places, values[: len(places)])
        try:
            cells.append(make_cell(server, filled, path, options.timeout_s))
        except RuntimeError as error:
            raise RuntimeError(f"{shorten(label)}: {error}") from error
    sheet = comparison_grid(cells, grid.y.headings(), grid.x.headings(), options.title)
    write_atomically(options.output, lambda temporary: sheet.save(temporary, "PNG"))
    sys.stdout.write(f"{options.output}\n")


def parse() -> argparse.ArgumentParser:
    parser = make_parser("compare", __doc__)
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--x", required=True, metavar="NODE.INPUT=VALUES", help="from left to right")
    parser.add_argument("--y", metavar="NODE.INPUT=VALUES", help="from top to bottom")
    parser.add_argument("--title", default="")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"))
    parser.add_argument(
        "--cells", type=Path, help="keep each picture in this folder, and go on with those that are there"
    )
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="default: %(default)s")
    parser.add_argument("--timeout-s", type=float, default=3600, help="for one picture; default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace a sheet that is there")
    return parser
