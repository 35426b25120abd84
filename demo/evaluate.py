"""Measure how well the demo model obeys captions never seen in training.

`python dev.py run -m pixart_pack.demo.evaluate` prints a Markdown table; every shape in the captions is a held-out
(shape, colour, position).
"""

import argparse
import logging
import sys
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .generate import DemoModel, generate, load_autoencoder, load_denoiser, load_text_encoder
from .scenes import Scene, caption, random_scene
from .scorer import ATTRIBUTES, add_scores, score
from .text import load_tokenizer
from .train import DENOISER_FILE, TEXT_FILE, VAE_FILE

TARGETS = {"background": 0.95, "colour": 0.90, "position": 0.85, "shape": 0.80}
logger = logging.getLogger(__name__)


def held_out_scenes(count: int, height_px: int, width_px: int, seed: int = 0) -> list[Scene]:
    """Scenes of one and two shapes in turn, every shape held out of training."""
    rng = Random(f"held out {seed}")
    return [random_scene(rng, 1 + k % 2, height_px, width_px, held_out=True) for k in range(count)]


def load_model(tokenizer_folder: Path | None = None) -> DemoModel:
    """The shipped demo model."""
    tokenizer = load_tokenizer(tokenizer_folder)
    return DemoModel(load_denoiser(DENOISER_FILE), load_text_encoder(TEXT_FILE), load_autoencoder(VAE_FILE), tokenizer)


def make_pictures(model: DemoModel, scenes: list[Scene], height_px: int, width_px: int, **options) -> list[np.ndarray]:
    """One picture per scene's caption, in batches of 25."""
    pictures = []
    seed = options.pop("seed", 0)
    for start in tqdm(range(0, len(scenes), 25), disable=not sys.stderr.isatty()):
        captions = [caption(scene) for scene in scenes[start : start + 25]]
        size = {"height_px": height_px, "width_px": width_px}
        pictures += list(generate(model, captions, **size, seed=seed + start, **options))
    return pictures


def contact_sheet(pictures: list[np.ndarray], columns: int = 10) -> Image.Image:
    """Lay pictures of one size out in rows."""
    height, width = pictures[0].shape[:2]
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for index, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (index % columns * width, index // columns * height))
    return sheet


def make_table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table of shares in percent, one row per label."""
    names = [*ATTRIBUTES, "count"]
    lines = ["| captions | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for label, shares in {**rows, "target": TARGETS}.items():
        cells = (f"{100 * shares[name]:.1f} %" if name in shares else "" for name in names)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser, count: int) -> None:
    """What every evaluation asks for. count: how many scenes, by default."""
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sampler", default="dpm_solver")
    parser.add_argument("--size", default="128x128", help="height x width in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path, help="folder of the T5 tokenizer; default: an importable ComfyUI's")
    parser.add_argument("--sheet", type=Path, help="write pictures there as one PNG")


def sampling_of(options: argparse.Namespace) -> dict:
    """The options that go to `generate`."""
    return {name: getattr(options, name) for name in ("steps", "guidance", "sampler", "seed")}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo.evaluate", description=__doc__)
    add_options(parser, count=200)
    return parser.parse_args()


def main() -> None:
    options = _parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    height_px, width_px = map(int, options.size.split("x"))
    scenes = held_out_scenes(options.count, height_px, width_px, options.seed)
    pictures = make_pictures(load_model(options.tokenizer), scenes, height_px, width_px, **sampling_of(options))
    scores = [score(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    rows = {"one shape": scores[::2], "two shapes": scores[1::2], "all": scores}
    logger.info("%s", make_table({label: add_scores(part) for label, part in rows.items() if part}))
    if options.sheet:
        contact_sheet(pictures).save(options.sheet)


if __name__ == "__main__":
    main()
