"""The demo's workflow on a running ComfyUI in one of its ways with memory, against the pictures that its CPU made."""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

from ...demo.client import ComfyClient
from ...demo.pictures import CAPTIONS, WORKFLOW, fill_workflow
from .parts import Finding, check

REFERENCE = "cpu"  # the mode whose pictures the others are held to
# Mean difference of the pixels, of 1: half precision moves edges by a part of a pixel.
LIMIT = 0.01
TIMEOUT_S = 300


def make_all(url: str) -> dict[str, Image.Image]:
    """Pictures of two captions, of another size, and of two models in turn, each by a prompt of its own."""
    client, template = ComfyClient(url), WORKFLOW.read_text(encoding="utf-8")
    wide = (160, 96)
    asked = {
        "first": (CAPTIONS[0], None, None),
        "wide": (CAPTIONS[4], wide, None),
        "another model": (CAPTIONS[0], None, "fp16"),
        "first again": (CAPTIONS[0], None, None),
    }
    pictures = {}
    for name, (caption, size, dtype) in asked.items():
        options = argparse.Namespace(seed=3, steps=8, guidance=None, size=size)
        workflow = fill_workflow(template, caption, options)
        if dtype:
            for node in workflow.values():
                if "dtype" in node["inputs"] and "checkpoint" in node["inputs"]:
                    node["inputs"]["dtype"] = dtype
        entry = client.wait(client.queue(workflow), timeout_s=TIMEOUT_S)
        (content,) = client.images(entry)
        pictures[name] = Image.open(io.BytesIO(content)).convert("RGB")
    return pictures


def compare(url: str, mode: str, folder: Path) -> list[Finding]:
    """Make the pictures, keep them in folder/mode, and hold them to those of REFERENCE, which was to be run before."""
    own = make_all(url)
    (folder / mode).mkdir(parents=True, exist_ok=True)
    for name, picture in own.items():
        picture.save(folder / mode / f"{name.replace(' ', '_')}.png")
    if mode == REFERENCE:
        return [Finding(f"host {mode}", name, 0.0) for name in own]

    def difference(name: str) -> float:
        expected = Image.open(folder / REFERENCE / f"{name.replace(' ', '_')}.png").convert("RGB")
        return float(np.abs(np.asarray(own[name], float) - np.asarray(expected, float)).mean() / 255)

    return [check(f"host {mode}", name, lambda n=name: difference(n), LIMIT) for name in own]
