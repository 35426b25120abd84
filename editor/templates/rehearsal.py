"""Lets any workflow run with the demo model: its files, its words, its sizes."""

import copy

import numpy as np
from PIL import Image

from ...demo.scenes import Item, Scene, draw_scene
from . import files, pictures, training

# What the demo model understands, for what the workflows ask of the big ones.
CAPTIONS = {
    pictures.CACTUS: "a large purple triangle in the bottom right and a small red square in the bottom left on a pink "
    "background",
    pictures.LIGHTHOUSE: "a large cyan triangle at the top on a gray background",
    pictures.TEAPOT: "a large blue circle in the center on a brown background",
    pictures.LONG_CAPTION: "a large green triangle on the right and a large yellow circle on the left on a brown "
    "background",
    pictures.FOUR_PROMPTS: "a large red circle in the center on a white background\n"
    "a large blue square in the top left on a black background\n"
    "a large yellow triangle in the bottom right on a brown background\n"
    "a small red circle in the bottom right and a large cyan square on the left on a gray background",
    pictures.WEIGHTED: "a (large:1.1) cyan (circle:1.2) on the right and a small (red square:1.1) on the left on a "
    "white background",
    training.PROMPT: "a large yellow star in the center on a white background",
    training.CLASS_CAPTION: "a large red circle in the center on a white background",
    pictures.AVOIDED: "a large green triangle on a black background",
}
SIDE_PX = 128
SMALLEST_BASE = "256"
TRAINING_STEPS = 30
TRAINERS = frozenset({"PixArtTrainLoRA", "PixArtTrain", "PixArtDistillLCM", "PixArtTrainControlNet"})
# Folder, shape and colour of the pictures to train on.
TRAINING_PICTURES = ((training.SUBJECT, "star", "yellow"), (training.CLASS, "circle", "red"))
# What the demo model, or its lack of further files, asks of a node.
SMALL = {
    "PixArtHEDPreprocessor": {"method": "soft edges", "hed_model": "auto", "fit": "keep"},
    "PixArtEncodeDataset": {"resolution": 64, "bins": "square"},
    "PixArtTrainControlNet": {"control_blocks": 3},
}
NEEDS = {"lora": "lora_training"}  # workflows that load what another one makes
INPUT_PICTURE = "example.png"  # what ComfyUI brings as the first picture of its input folder


def rehearse(workflow: dict, steps: int | None = None, side_px: int = SIDE_PX) -> dict:
    """The workflow, in API format, for the demo model. steps: at most so many; None leaves those of sampling."""
    workflow = copy.deepcopy(workflow)
    for node in workflow.values():
        inputs, kind = node["inputs"], node["class_type"]
        for name, value in inputs.items():
            if isinstance(value, str):
                inputs[name] = CAPTIONS.get(value, files.stand_in(value))
            elif name == "steps" and isinstance(value, int):
                inputs[name] = min(value, steps or value)
        inputs |= {name: value for name, value in SMALL.get(kind, {}).items() if not isinstance(inputs[name], list)}
        if kind == "EmptyLatentImage":
            inputs |= {name: side_px for name in ("width", "height") if not isinstance(inputs[name], list)}
        if kind in TRAINERS:
            inputs["steps"] = min(inputs["steps"], steps or TRAINING_STEPS)
        if inputs.get("mode") == "into the nearest bin":
            inputs |= {"mode": "to a size", "width": side_px, "height": side_px}
        if isinstance(inputs.get("base"), str):
            inputs["base"] = SMALLEST_BASE
    return workflow


def prepare(client) -> None:
    """Put the pictures that the workflows ask for into a server's input folder. client: a ComfyServer."""
    client.upload(input_picture(), INPUT_PICTURE)
    for folder, shape, colour in TRAINING_PICTURES:
        for number, background in enumerate(("white", "gray")):
            scene = Scene(background, (Item(shape, colour, "center", "large"),))
            client.upload(Image.fromarray(draw_scene(scene, SIDE_PX, SIDE_PX)), f"{folder}/{number}.png")


def input_picture(side_px: int = SIDE_PX) -> Image.Image:
    """The picture that workflows with Load Image get: a shape in the center, over which a square is transparent."""
    scene = Scene("gray", (Item("circle", "yellow", "center", "large"),))
    pixels = draw_scene(scene, side_px, side_px)
    opacity = np.full((side_px, side_px, 1), 255, np.uint8)
    hole = slice(side_px // 5, -(side_px // 5))
    opacity[hole, hole] = 0
    return Image.fromarray(np.concatenate((pixels, opacity), -1))
