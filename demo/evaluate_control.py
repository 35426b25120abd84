"""Measure how well the demo's ControlNet makes pictures follow edges.

`python dev.py run -m pixart_pack.demo.evaluate_control` prints a Markdown table: held-out scenes are drawn, their edges
and a caption of their colours are given to the model, and the shapes in its pictures are compared with the drawn ones.
"""

import argparse
import logging
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..pixart.controlnet import PixArtControlNet
from ..pixart.drawing.sheets import comparison_grid
from ..pixart.weights.controlnets import read_controlnet
from .control import colour_caption, draw_hints
from .decoder_stage import to_tensor
from .evaluate import add_options, held_out_scenes, load_model, sampling_of
from .generate import DemoModel, Steering, generate
from .scenes import Scene, draw_scene
from .scorer import find_background, find_masks, mean_overlap
from .train import MODELS

CONTROL_FILE = MODELS / "controlnet" / "pixart_demo_control.safetensors"
COLUMNS = {"overlap": "mean IoU", "colour": "colours", "background": "background", "count": "count"}
TARGETS = {"with control": {"overlap": 0.75, "colour": 0.85}, "without control": {"overlap": 0.35}}
SHEET_SCENES, SHEET_ROWS = 8, ("edges", "without control", "with control")
_BATCH = 25
logger = logging.getLogger(__name__)


def load_control(path: Path = CONTROL_FILE) -> PixArtControlNet:
    """The ControlNet of a file, in float32."""
    checkpoint = read_controlnet(path)
    control = PixArtControlNet(checkpoint.config, checkpoint.num_copies)
    control.load_state_dict({name: value.float() for name, value in checkpoint.state_dict.items()})
    return control.eval().requires_grad_(False)


def draw_scenes(scenes: list[Scene], height_px: int, width_px: int) -> list[np.ndarray]:
    return [draw_scene(scene, height_px, width_px) for scene in scenes]


def steer(
    model: DemoModel, control: PixArtControlNet | None, scenes: list[Scene], height_px: int, width_px: int, **options
) -> list[np.ndarray]:
    """A picture for the edges and the colours of each scene; for the colours alone when control is None."""
    pictures: list[np.ndarray] = []
    seed = options.pop("seed", 0)
    for start in tqdm(range(0, len(scenes), _BATCH), disable=not sys.stderr.isatty()):
        part = scenes[start : start + _BATCH]
        hints = draw_hints(to_tensor(draw_scenes(part, height_px, width_px)))
        steering = None if control is None else Steering(control, hints)
        size = {"height_px": height_px, "width_px": width_px}
        captions = [colour_caption(scene) for scene in part]
        pictures += list(generate(model, captions, **size, seed=seed + start, steering=steering, **options))
    return pictures


def measure(pictures: list[np.ndarray], scenes: list[Scene]) -> dict[str, float]:
    """Shares over pictures of one size.

    overlap: mean intersection over union with the drawn shapes. colour: of the shapes drawn or found, whichever are
    more, those whose colour the caption names. background, count: pictures in which it is right.
    """
    overlaps, right, total, backgrounds, counts = [], 0, 0, 0, 0
    for picture, scene in zip(pictures, scenes, strict=True):
        background = find_background(picture)
        found = find_masks(picture, background)
        drawn = find_masks(draw_scene(scene, *picture.shape[:2]), scene.background)
        overlaps.append(mean_overlap([mask for _, mask in found], [mask for _, mask in drawn]))
        asked = Counter(item.colour for item in scene.items)
        right += sum((asked & Counter(colour for colour, _ in found)).values())
        total += max(len(found), len(scene.items))
        backgrounds += background == scene.background
        counts += len(found) == len(scene.items)
    share = 1 / len(scenes)
    return {
        "overlap": float(np.mean(overlaps)),
        "colour": right / total,
        "background": backgrounds * share,
        "count": counts * share,
    }


def make_table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table: IoU as a number, the rest in percent."""
    lines = ["| pictures | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for label, shares in rows.items():
        cells = (_cell(name, shares[name], TARGETS.get(label, {}).get(name)) for name in COLUMNS)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, value: float, target: float | None) -> str:
    shown, wanted = (
        "" if number is None else f"{number:.3f}" if name == "overlap" else f"{100 * number:.1f} %"
        for number in (value, target)
    )
    return f"{shown} (target {wanted})" if wanted else shown


def draw_sheet(
    scenes: list[Scene], without: list[np.ndarray], with_control: list[np.ndarray], height_px: int, width_px: int
) -> Image.Image:
    """Edges, pictures without and with control in three rows, under the captions."""
    hints = draw_hints(to_tensor(draw_scenes(scenes, height_px, width_px)))
    edges = list((hints * 255).round().byte().permute(0, 2, 3, 1).numpy())
    pictures = [Image.fromarray(picture) for picture in (*edges, *without, *with_control)]
    return comparison_grid(pictures, SHEET_ROWS, [colour_caption(scene) for scene in scenes])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo.evaluate_control", description=__doc__)
    add_options(parser, count=100)
    parser.add_argument("--control", type=Path, default=CONTROL_FILE)
    return parser.parse_args()


def main() -> None:
    options = _parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    height_px, width_px = map(int, options.size.split("x"))
    scenes = held_out_scenes(options.count, height_px, width_px, options.seed)
    model = load_model(options.tokenizer)
    sampling = sampling_of(options)
    with_control = steer(model, load_control(options.control), scenes, height_px, width_px, **sampling)
    without = steer(model, None, scenes, height_px, width_px, **sampling)
    rows = {"with control": measure(with_control, scenes), "without control": measure(without, scenes)}
    logger.info("%s", make_table(rows))
    if options.sheet:
        shown = scenes[:SHEET_SCENES], without[:SHEET_SCENES], with_control[:SHEET_SCENES]
        draw_sheet(*shown, height_px, width_px).save(options.sheet)


if __name__ == "__main__":
    main()
