"""Write `workflows/`: every workflow as the editor has it, its twin for the API, and its picture.

A server of its own tells what the nodes look like. With --thumbnails each workflow runs on it with the demo model.
"""

import argparse
import io
import json
import sys
from pathlib import Path

from PIL import Image

from ...demo.client import ComfyClient
from ...devtools.process import ROOT, stop_on_signals
from ..connection import connect
from .api import to_api
from .files import FILES
from .graph import Workflow
from .pictures import WORKFLOWS
from .rehearsal import INPUT_PICTURE, input_picture, rehearse

WORKFLOWS_FOLDER = ROOT / "workflows"
THUMBNAIL_PX = 400


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make(name: str, object_info: dict) -> dict:
    """A workflow of the collection, as the editor has it."""
    workflow = Workflow(name, object_info, FILES)
    WORKFLOWS[name](workflow)
    return workflow.to_editor()


def write_thumbnail(client: ComfyClient, api: dict, path: Path) -> None:
    """Run a workflow with the demo model; its pictures become the thumbnail."""
    entry = client.wait(client.queue(rehearse(api)))
    saved = {number for number, node in api.items() if node["class_type"] == "SaveImage"}
    entry["outputs"] = {number: output for number, output in entry["outputs"].items() if number in saved}
    pictures = [Image.open(io.BytesIO(content)).convert("RGB") for content in client.images(entry)]
    picture = pictures[0] if len(pictures) == 1 else tile(pictures)
    scale = THUMBNAIL_PX / max(picture.size)
    size = tuple(round(side * scale) for side in picture.size)
    picture.resize(size, Image.Resampling.LANCZOS).save(path, quality=88)


def tile(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size in two columns."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (2 * width, -(-len(pictures) // 2) * height))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % 2 * width, index // 2 * height))
    return sheet


def write_all(client: ComfyClient, names: list[str], thumbnails: bool) -> None:
    object_info = client.get_json("/object_info")
    client.upload(input_picture(), INPUT_PICTURE)
    for name in names:
        workflow = make(name, object_info)
        api = to_api(workflow, object_info)
        write_json(WORKFLOWS_FOLDER / f"{name}.json", workflow)
        write_json(WORKFLOWS_FOLDER / "api" / f"{name}.json", api)
        if thumbnails:
            write_thumbnail(client, api, WORKFLOWS_FOLDER / f"{name}.jpg")
        sys.stdout.write(f"{name}\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(WORKFLOWS), metavar="NAME", help="default: all")
    parser.add_argument("--thumbnails", action="store_true", help="run each with the demo model, for its picture")
    parser.add_argument("--url", help="a running server to ask, in place of one of its own")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    stop_on_signals()
    with connect(options.url) as client:
        write_all(client, options.names, options.thumbnails)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
