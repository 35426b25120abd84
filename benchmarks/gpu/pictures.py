"""The demo's workflow on a running ComfyUI in one of its ways with memory, against the pictures that its CPU made."""

import argparse
import io
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ...demo.client import ComfyClient
from ...demo.pictures import CAPTIONS, WORKFLOW, fill_workflow, set_inputs
from .parts import Finding, check

REFERENCE = "cpu"  # the mode whose pictures the others are held to
# Mean difference of the pixels, of 1: half precision moves edges by a part of a pixel.
LIMIT = 0.01
# Between the loader and all that takes its model. They reuse at every second step, whatever has changed, so that no
# rounding decides.
DIALS = {
    "PixArtBlockCache": {"threshold": 2.0, "start_percent": 0.3, "most_reuses": 1},
    "PixArtGuidanceReuse": {"every": 2, "start_percent": 0.3},
    "PixArtKVCompression": {"factor": 2},
}


def make_all(url: str, left_s: float) -> dict[str, Image.Image]:
    """Pictures of two captions, of another size, of two models in turn, and with caches, each by a prompt of its own.

    Raises TimeoutError when they are not there in the time that is left.
    """
    ends = time.monotonic() + left_s
    client, template = ComfyClient(url), WORKFLOW.read_text(encoding="utf-8")
    wide = (160, 96)
    asked = {
        "first": (CAPTIONS[0], None, None),
        "wide": (CAPTIONS[4], wide, None),
        "another model": (CAPTIONS[0], None, "fp16"),
        "first again": (CAPTIONS[0], None, None),
        "with caches": (CAPTIONS[0], None, None),
    }
    pictures = {}
    for name, (caption, size, dtype) in asked.items():
        options = argparse.Namespace(seed=3, steps=8, guidance=None, size=size)
        workflow = fill_workflow(template, caption, options)
        if dtype:
            set_inputs(workflow, ("weight_dtype",), dtype)
        if name == "with caches":
            turn_dials(workflow)
        left_s = ends - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        entry = client.wait(client.queue(workflow), timeout_s=left_s)
        (content,) = client.images(entry)
        pictures[name] = Image.open(io.BytesIO(content)).convert("RGB")
    return pictures


def turn_dials(workflow: dict) -> None:
    """Puts DIALS one after another behind the loader of an API-format workflow."""
    loader = next(name for name, node in workflow.items() if node["class_type"] == "PixArtLoadCheckpoint")
    last, added = [loader, 0], {}
    for kind, inputs in DIALS.items():
        added[kind] = {"class_type": kind, "inputs": {**inputs, "model": last}}
        last = [kind, 0]
    for node in workflow.values():
        links = [key for key, value in node["inputs"].items() if value == [loader, 0]]
        node["inputs"].update(dict.fromkeys(links, last))
    workflow.update(added)


def compare(url: str, mode: str, folder: Path, left_s: float) -> list[Finding]:
    """Make the pictures, keep them in folder/mode, and hold them to those of REFERENCE, which was to be run before."""
    own = make_all(url, left_s)
    (folder / mode).mkdir(parents=True, exist_ok=True)
    for name, picture in own.items():
        picture.save(folder / mode / f"{name.replace(' ', '_')}.png")
    if mode == REFERENCE:
        return [Finding(f"host {mode}", name, 0.0) for name in own]

    def difference(name: str) -> float:
        expected = Image.open(folder / REFERENCE / f"{name.replace(' ', '_')}.png").convert("RGB")
        return float(np.abs(np.asarray(own[name], float) - np.asarray(expected, float)).mean() / 255)

    return [check(f"host {mode}", name, lambda n=name: difference(n), LIMIT) for name in own]
