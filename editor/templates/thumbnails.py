"""The pictures of the workflows: what each makes of the demo model, so that one sees what is special about it."""

import io
import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ...demo.client import ComfyClient
from .rehearsal import halve_bins, input_picture, rehearse

THUMBNAIL_PX, INSET_PX, INSET_GAP_PX = 400, 110, 8
LABEL_PX, LETTER_PX = 44, 22
CARD_LETTERS, CARD_LETTER_PX = 42, 16  # so that a path stands on one line
BEFORE_PX, AFTER_PX, FRAME_PX = 190, 250, 4
# What the picture alone does not tell.
LABELS = {
    "demo_app": "app",
    "text_to_image_app": "app",
    "image_to_image_app": "app",
    "styles_app": "app",
    "lora_training_app": "app",
    "any_aspect_ratio": "1:4 to 4:1",
    "hires_fix": "two passes",
    "negative_prompts": "(word:1.3), negative",
    "lcm_4_steps": "4 steps",
    "dmd_1_step": "1 step",
    "sa_solver_25": "SA-Solver, 25 steps",
    "low_memory": "T5 in fp8, on the CPU",
    "load_prompt_embeddings": "no T5 in memory",
    "lora_training": "10 to 30 pictures",
    "dreambooth": "all weights",
    "lcm_distillation": "learns 4 steps",
    "controlnet_training": "learns edges",
    "convert_a_checkpoint": "ComfyUI, diffusers, original",
}
# Where a picture before tells what changed: the one that goes in, or one made with these values of a node.
FROM_INPUT = frozenset({"image_to_image", "image_to_image_app", "inpaint", "controlnet_hed", "two_controlnets"})
WITHOUT = {"lora": ("PixArtLoadLoRA", {"strength": 0.0})}


def write_thumbnail(client: ComfyClient, name: str, api: dict, first: Path | None, path: Path) -> None:
    """Run a workflow with the demo model; its pictures become the thumbnail. first: one to run before."""
    if first:
        client.wait(client.queue(rehearse(json.loads(first.read_text(encoding="utf-8")))))
    ready = halve_bins(rehearse(api))
    entry = client.wait(client.queue(ready))
    texts = [text for output in entry["outputs"].values() for text in output.get("text", ())]
    pictures, previews = (shown(client, api, entry, kind) for kind in ("SaveImage", "PreviewImage"))
    picture = card("\n".join(texts)) if not pictures else pictures[0] if len(pictures) == 1 else tile(pictures)
    picture = enlarge(picture)
    inset(picture, previews)
    before = _before(client, name, ready)
    if before:
        picture = change(enlarge(before), picture)
    if name in LABELS:
        picture = label(picture, LABELS[name])
    picture.save(path, quality=88)


def _before(client: ComfyClient, name: str, api: dict) -> Image.Image | None:
    if name in FROM_INPUT:
        return input_picture(opaque=True)
    if name not in WITHOUT:
        return None
    kind, values = WITHOUT[name]
    changed = {
        number: {**node, "inputs": {**node["inputs"], **(values if node["class_type"] == kind else {})}}
        for number, node in api.items()
    }
    return shown(client, changed, client.wait(client.queue(changed)), "SaveImage")[0]


def shown(client: ComfyClient, api: dict, entry: dict, node_type: str) -> list[Image.Image]:
    """The pictures that nodes of a type show, of a prompt's entry in the history."""
    outputs = {number: each for number, each in entry["outputs"].items() if api[number]["class_type"] == node_type}
    return [Image.open(io.BytesIO(content)).convert("RGB") for content in client.images({"outputs": outputs})]


def enlarge(picture: Image.Image) -> Image.Image:
    scale = THUMBNAIL_PX / max(picture.size)
    return picture.resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS)


def change(before: Image.Image, after: Image.Image) -> Image.Image:
    """What goes in, and in front of it what comes out."""
    sheet = Image.new("RGB", (THUMBNAIL_PX, THUMBNAIL_PX), "#223")
    for picture, side, corner in ((before, BEFORE_PX, 0), (after, AFTER_PX, 1)):
        small = picture.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        framed = ImageOps.expand(small, FRAME_PX, "#dde")
        room = (THUMBNAIL_PX - framed.width, THUMBNAIL_PX - framed.height)
        sheet.paste(framed, tuple(INSET_GAP_PX if not corner else each - INSET_GAP_PX for each in room))
    return sheet


def label(picture: Image.Image, text: str) -> Image.Image:
    """A picture with words below it."""
    sheet = Image.new("RGB", (picture.width, picture.height + LABEL_PX), "#223")
    sheet.paste(picture, (0, 0))
    place = (picture.width / 2, picture.height + LABEL_PX / 2)
    ImageDraw.Draw(sheet).text(place, text, "#dde", ImageFont.load_default(LETTER_PX), anchor="mm")
    side = max(sheet.size)
    square = Image.new("RGB", (side, side), "#223")
    square.paste(sheet, ((side - sheet.width) // 2, (side - sheet.height) // 2))
    return enlarge(square)


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
    lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, CARD_LETTERS) or [""]]
    ImageDraw.Draw(sheet).multiline_text(
        (24, 28), "\n".join(lines[:14]), "#dde", ImageFont.load_default(CARD_LETTER_PX), spacing=9
    )
    return sheet


def tile(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size in two columns."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (2 * width, -(-len(pictures) // 2) * height))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % 2 * width, index // 2 * height))
    return sheet
