"""Write `workflows/`: every workflow as the editor has it, its twin for the API, and its picture.

A server of its own shows what the nodes look like. With --thumbnails each workflow runs on it with the demo model.
"""

import argparse
import io
import json
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ...demo.client import ComfyClient
from ...devtools.process import ROOT, stop_on_signals
from ..connection import connect
from .api import to_api
from .collection import WORKFLOWS
from .files import FILES
from .graph import Workflow
from .rehearsal import NEEDS, halve_bins, prepare, rehearse

WORKFLOWS_FOLDER = ROOT / "workflows"
THUMBNAIL_PX, INSET_PX, INSET_GAP_PX = 400, 110, 8


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
    if path.stem in NEEDS:
        first = WORKFLOWS_FOLDER / "api" / f"{NEEDS[path.stem]}.json"
        client.wait(client.queue(rehearse(json.loads(first.read_text(encoding="utf-8")))))
    entry = client.wait(client.queue(halve_bins(rehearse(api))))
    texts = [text for output in entry["outputs"].values() for text in output.get("text", ())]
    pictures, previews = (shown(client, api, entry, kind) for kind in ("SaveImage", "PreviewImage"))
    picture = card("\n".join(texts)) if not pictures else pictures[0] if len(pictures) == 1 else tile(pictures)
    scale = THUMBNAIL_PX / max(picture.size)
    picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS)
    inset(picture, previews)
    picture.save(path, quality=88)


def shown(client: ComfyClient, api: dict, entry: dict, node_type: str) -> list[Image.Image]:
    """The pictures that nodes of a type show, of a prompt's entry in the history."""
    outputs = {number: each for number, each in entry["outputs"].items() if api[number]["class_type"] == node_type}
    return [Image.open(io.BytesIO(content)).convert("RGB") for content in client.images({"outputs": outputs})]


def inset(picture: Image.Image, previews: list[Image.Image]) -> None:
    """Put small copies of previews, such as the edges or the loss, into the bottom left corner, beside one another."""
    left = INSET_GAP_PX
    for preview in previews:
        small = preview.copy()
        small.thumbnail((2 * INSET_PX, INSET_PX))
        small = ImageOps.expand(small, 2, "#dde")
        picture.paste(small, (left, picture.height - small.height - INSET_GAP_PX))
        left += small.width + INSET_GAP_PX


def card(text: str) -> Image.Image:
    """A text on a square card, for a workflow without pictures."""
    sheet = Image.new("RGB", (THUMBNAIL_PX, THUMBNAIL_PX), "#223")
    lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, 30) or [""]]
    ImageDraw.Draw(sheet).multiline_text((24, 28), "\n".join(lines[:12]), "#dde", ImageFont.load_default(21), spacing=9)
    return sheet


def tile(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size in two columns."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (2 * width, -(-len(pictures) // 2) * height))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % 2 * width, index // 2 * height))
    return sheet


def write_all(client: ComfyClient, names: list[str], thumbnails: bool) -> None:
    object_info = client.get_json("/object_info")
    prepare(client)
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
