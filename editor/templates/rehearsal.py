"""Lets any workflow run with the demo model: its files, its words, its sizes."""

import copy

import numpy as np
from PIL import Image

from ...demo.scenes import Item, Scene, draw_scene
from . import files, pictures, training

# What the demo model understands, for what the workflows ask of the big ones: what it draws well with their seeds.
CAPTIONS = {
    pictures.CACTUS: "a small red circle on the left and a small cyan cross in the top right and a small red triangle "
    "in the bottom right on a brown background",
    pictures.LIGHTHOUSE: "a small cyan cross in the bottom left and a small purple circle in the bottom right and a "
    "small blue cross in the top left on a pink background",
    pictures.BOAT: "a large yellow square in the top right and a large cyan square in the bottom left on a black "
    "background",
    pictures.KITE: "a large red triangle in the center on a gray background",
    pictures.TEAPOT: "a large red circle in the center on a brown background",
    pictures.PAINTED: "a large red circle in the center on a pink background",  # of the picture that goes in
    pictures.LONG_CAPTION: "a small yellow circle in the top right and a small red cross in the bottom right and a "
    "small yellow triangle in the bottom left on a brown background",
    pictures.FOUR_PROMPTS: "a large green square on the right on a black background\n"
    "a large yellow circle in the top right on a brown background\n"
    "a large cyan triangle in the bottom right on a white background\n"
    "a small red cross on the left on a gray background",
    pictures.WEIGHTED: "a small (cyan cross:1.1) in the bottom left and a (small purple:1.1) circle in the bottom "
    "right and a small blue cross in the top left on a pink background",
    pictures.AVOIDED: "",
    training.SUBJECT_CAPTION: "a large yellow star in the center",
    training.PROMPT: "a large yellow star in the center on a white background",
    training.CLASS_CAPTION: "a large red circle in the center",
}
SIDE_PX = 128
SMALLEST_BASE = "256"
TRAINING_STEPS = 30
FEW_STEPS = 4  # of validation pictures, which rehearsals do not look at
TRAINERS = frozenset({"PixArtTrainLoRA", "PixArtTrain", "PixArtDistillLCM", "PixArtTrainControlNet"})
# Folder, shape and colour of the pictures to train on.
TRAINING_PICTURES = ((training.SUBJECT, "star", "yellow"), (training.CLASS, "circle", "red"))
# What the demo model, or its lack of further files, asks of a node.
SMALL = {
    "PixArtHEDPreprocessor": {"method": "soft edges", "hed_model": "auto", "fit": "keep"},
    "PixArtEncodeDataset": {"bins": "square"},
    "PixArtTrainControlNet": {"control_blocks": 3},
}
# What lets it learn a shape from two pictures in a minute or two.
QUICK = {"batch_size": 2, "weighting": "velocity", "schedule": "cosine"}
LESSONS = {
    "PixArtTrainLoRA": {**QUICK, "steps": 300, "learning_rate": 1e-3, "targets": "blocks"},
    "PixArtTrain": {**QUICK, "steps": 200, "learning_rate": 2e-4},
}
# Workflows that load what another one makes.
NEEDS = {"lora": "lora_training", "load_prompt_embeddings": "save_prompt_embeddings"}
INPUT_PICTURE = "example.png"  # what ComfyUI brings as the first picture of its input folder


def rehearse(workflow: dict, steps: int | None = None, side_px: int = SIDE_PX) -> dict:
    """The workflow, in API format, for the demo model.

    steps: at most so many, in training too; None leaves those of sampling, and lets trainers learn something.
    """
    workflow = copy.deepcopy(workflow)
    kinds = {node["class_type"] for node in workflow.values()}
    if "LatentUpscaleBy" in kinds:
        side_px = side_px * 3 // 4  # what is enlarged is to end near the size that the demo model knows
    for node in workflow.values():
        inputs, kind = node["inputs"], node["class_type"]
        for name, value in inputs.items():
            if isinstance(value, str):
                inputs[name] = CAPTIONS.get(value, files.stand_in(value))
            elif name == "steps" and isinstance(value, int):
                inputs[name] = min(value, steps or value)
            elif name == "cfg" and isinstance(value, float | int):
                inputs[name] = min(value, files.DEMO_GUIDANCE)
        changes = {**SMALL.get(kind, {}), **_sizes(inputs, kind, side_px)}
        if kind in TRAINERS:
            changes |= {"sample_steps": FEW_STEPS}
            changes |= {"steps": steps} if steps else LESSONS.get(kind, {"steps": TRAINING_STEPS})
        inputs |= {name: value for name, value in changes.items() if not isinstance(inputs.get(name), list)}
    return workflow


def _sizes(inputs: dict, kind: str, side_px: int) -> dict:
    """What to change about a node's sizes."""
    if kind == "PixArtEncodeDataset":
        return {"resolution": side_px}
    sides = {"width": side_px, "height": side_px}
    base = {"base": SMALLEST_BASE} if "base" in inputs else {}
    if inputs.get("mode") == "into the nearest bin":
        return {**base, **sides, "mode": "to a size"}
    return {**base, **(sides if kind == "EmptyLatentImage" else {})}


def halve_bins(workflow: dict) -> dict:
    """The workflow with latents of half the sides where PixArt Resolution chose them: the demo model's own area."""
    workflow = copy.deepcopy(workflow)
    for number, node in tuple(workflow.items()):
        for name, value in node["inputs"].items():
            if isinstance(value, list) and workflow[value[0]]["class_type"] == "PixArtResolution":
                half = {"samples": value, "upscale_method": "nearest-exact", "scale_by": 0.5}
                workflow[f"half of {number}"] = {"class_type": "LatentUpscaleBy", "inputs": half}
                node["inputs"][name] = [f"half of {number}", 0]
    return workflow


def prepare(client) -> None:
    """Put the pictures that the workflows ask for into a server's input folder. client: a ComfyServer."""
    client.upload(input_picture(), INPUT_PICTURE)
    for folder, shape, colour in TRAINING_PICTURES:
        for number, background in enumerate(("white", "gray")):
            scene = Scene(background, (Item(shape, colour, "center", "large"),))
            client.upload(Image.fromarray(draw_scene(scene, SIDE_PX, SIDE_PX)), f"{folder}/{number}.png")


def input_picture(side_px: int = SIDE_PX, opaque: bool = False) -> Image.Image:
    """The picture that workflows with Load Image get: a shape in the center, over which a square is transparent.

    opaque: with nothing transparent, as it is seen.
    """
    scene = Scene("gray", (Item("circle", "yellow", "center", "large"),))
    pixels = draw_scene(scene, side_px, side_px)
    if opaque:
        return Image.fromarray(pixels)
    opacity = np.full((side_px, side_px, 1), 255, np.uint8)
    hole = slice(side_px // 5, -(side_px // 5))
    opacity[hole, hole] = 0
    return Image.fromarray(np.concatenate((pixels, opacity), -1))
