"""Measure how well the demo model obeys captions never seen in training.

`python dev.py run -m pixart_pack.demo.evaluate` prints a Markdown table; every shape in the captions is a held-out
(shape, colour, position).
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .autoencoder import Autoencoder
from .decoder_stage import to_tensor
from .generate import GUIDANCE, DemoModel, generate, load_autoencoder, load_denoiser, load_text_encoder
from .scenes import Scene, caption, draw_scene, random_scene
from .scorer import ATTRIBUTES, add_scores, count_confusions, score
from .sharpness import measure_sharpness
from .text import load_tokenizer
from .train import DENOISER_FILE, TEXT_FILE, VAE_FILE

WORDS = {1: "one shape", 2: "two shapes", 3: "three shapes"}
TARGETS = {"background": 0.95, "colour": 0.90, "position": 0.85, "shape": 0.80}
logger = logging.getLogger(__name__)


def held_out_scenes(
    count: int, height_px: int, width_px: int, seed: int = 0, shapes: Sequence[int] = (1, 2)
) -> list[Scene]:
    """Scenes of so many shapes in turn, every shape held out of training."""
    rng = Random(f"held out {seed}")
    return [random_scene(rng, shapes[k % len(shapes)], height_px, width_px, held_out=True) for k in range(count)]


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


def make_confusion_table(pictures: list[np.ndarray], scenes: list[Scene]) -> str:
    """A Markdown table: of each shape, how often it is seen as which."""
    seen = count_confusions(pictures, scenes)
    columns = [*seen, "nothing"]
    lines = ["| shape, seen as | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    lines += [
        f"| {shape} | " + " | ".join(str(times[name]) for name in columns) + " |" for shape, times in seen.items()
    ]
    return "\n".join(lines)


def describe_sharpness(pictures: list[np.ndarray]) -> str:
    """How far pictures are on average from what is seen in them, drawn well."""
    errors, distances = zip(*map(measure_sharpness, pictures), strict=True)
    outlines = [distance for distance in distances if distance is not None]
    outline = f"{np.mean(outlines):.2f} px" if outlines else "none"
    return (
        f"Against what is seen in them, drawn well: outlines {outline} off, mean absolute error {np.mean(errors):.4f}"
    )


def reconstruct(autoencoder: Autoencoder, scenes: list[Scene], height_px: int, width_px: int) -> list[np.ndarray]:
    """The scenes, drawn and sent through the autoencoder: what it loses is not the denoiser's to mend."""
    restored = []
    for start in range(0, len(scenes), 25):
        drawn = to_tensor([draw_scene(scene, height_px, width_px) for scene in scenes[start : start + 25]])
        with torch.no_grad():
            pictures = autoencoder.decode(autoencoder.encode(drawn))
        restored += list((pictures * 255).round().byte().permute(0, 2, 3, 1).numpy())
    return restored


def add_options(parser: argparse.ArgumentParser, count: int) -> None:
    """What every evaluation asks for. count: how many scenes, by default."""
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
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
    parser.add_argument(
        "--shapes", type=int, nargs="+", choices=WORDS, default=[1, 2], help="in the captions, in turn (default: 1 2)"
    )
    parser.add_argument("--autoencoder", action="store_true", help="score drawn scenes through the autoencoder alone")
    return parser.parse_args()


def main() -> None:
    options = _parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    height_px, width_px = map(int, options.size.split("x"))
    scenes = held_out_scenes(options.count, height_px, width_px, options.seed, options.shapes)
    if options.autoencoder:
        pictures = reconstruct(load_autoencoder(VAE_FILE), scenes, height_px, width_px)
    else:
        pictures = make_pictures(load_model(options.tokenizer), scenes, height_px, width_px, **sampling_of(options))
    scores = [score(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    rows = {WORDS[many]: scores[k :: len(options.shapes)] for k, many in enumerate(options.shapes)}
    rows["all"] = scores
    logger.info("%s", make_table({label: add_scores(part) for label, part in rows.items() if part}))
    logger.info("\n%s\n\n%s", make_confusion_table(pictures, scenes), describe_sharpness(pictures))
    if options.sheet:
        contact_sheet(pictures).save(options.sheet)


if __name__ == "__main__":
    main()
