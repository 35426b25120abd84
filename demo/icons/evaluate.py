"""Measure how well a model of the icons obeys captions never seen in training, and how sharp its pictures are.

`python dev.py run -m pixart_pack.demo.icons.evaluate` prints Markdown tables. With --autoencoder the captions' pictures
are drawn and go through the autoencoder alone, with --drawn they are only drawn: what is lost there is none of the
denoiser's.
"""

import argparse
import logging
import sys
from pathlib import Path
from random import Random

import numpy as np
import torch
from tqdm import tqdm

from ..evaluate import contact_sheet
from ..generate import DemoModel, generate, load_autoencoder, load_denoiser, load_text_encoder
from ..text import load_tokenizer
from .autoencoder_stage import reconstruct
from .captions import caption
from .scenes import Scene, draw_scene, random_scene
from .scorer import ATTRIBUTES, Reading, add_scores, confusion, read, score
from .train import FOLDER

BATCH = 25
MOST_EVALUATED = 3  # icons in a caption
logger = logging.getLogger(__name__)


def evaluated_scenes(count: int, height_px: int, width_px: int, seed: int = 0) -> list[Scene]:
    """Scenes of one, two and three icons in turn, every icon held out of training."""
    rng = Random(f"held out {seed}")
    return [random_scene(rng, 1 + k % MOST_EVALUATED, height_px, width_px, held_out=True) for k in range(count)]


def load_model(models: Path, tokenizer_folder: Path | None = None) -> DemoModel:
    """The model of a folder of ComfyUI's layout."""
    denoiser = load_denoiser(models / "diffusion_models" / "pixart_demo.safetensors")
    text = load_text_encoder(models / "text_encoders" / "pixart_demo_t5.safetensors")
    autoencoder = load_autoencoder(models / "vae" / "pixart_demo_vae.safetensors")
    return DemoModel(denoiser, text, autoencoder, load_tokenizer(tokenizer_folder))


def make_pictures(options: argparse.Namespace, scenes: list[Scene], height_px: int, width_px: int) -> list[np.ndarray]:
    """One picture per scene, as the options say."""
    drawn = [draw_scene(scene, height_px, width_px) for scene in scenes]
    if options.drawn:
        return drawn
    starts = tqdm(range(0, len(scenes), BATCH), disable=not sys.stderr.isatty())
    if options.autoencoder:
        model = load_autoencoder(options.models / "vae" / "pixart_demo_vae.safetensors")
        return [picture for start in starts for picture in reconstruct(model, drawn[start : start + BATCH])]
    model, pictures = load_model(options.models, options.tokenizer), []
    settings = {"steps": options.steps, "guidance": options.guidance, "height_px": height_px, "width_px": width_px}
    for start in starts:
        captions = [caption(scene) for scene in scenes[start : start + BATCH]]
        pictures += list(generate(model, captions, seed=options.seed + start, **settings))
    return pictures


def describe_rows(rows: dict[str, list[tuple[Reading, Scene]]]) -> str:
    """A Markdown table, one row per label: shares of what is right, outlines and errors."""
    lines = [f"| captions | {' | '.join(ATTRIBUTES)} | outline | error |", "| --- |" + " --- |" * (len(ATTRIBUTES) + 2)]
    for label, part in rows.items():
        shares = add_scores(score(reading, scene) for reading, scene in part)
        outlines = [reading.outline_px for reading, _ in part if reading.outline_px is not None]
        cells = [f"{100 * shares[name]:.1f} %" for name in ATTRIBUTES]
        cells += [f"{np.mean(outlines or [np.nan]):.2f} px", f"{np.mean([reading.error for reading, _ in part]):.4f}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_confusion(readings: list[Reading], scenes: list[Scene]) -> str:
    """A Markdown table: each shape, how often it is right, and what it is taken for otherwise."""
    lines = ["| shape | right | taken for |", "| --- | --- | --- |"]
    for name, seen in confusion(readings, scenes).items():
        total = sum(seen.values())
        others = ", ".join(f"{other} {times}" for other, times in seen.most_common() if other != name)
        lines.append(f"| {name} | {seen[name]} of {total} | {others} |")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo.icons.evaluate", description=__doc__)
    parser.add_argument("--models", type=Path, default=FOLDER / "models", help="folder of ComfyUI's layout")
    parser.add_argument("--drawn", action="store_true", help="score drawn pictures")
    parser.add_argument("--autoencoder", action="store_true", help="score drawn pictures through the autoencoder")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--size", default="128x128", help="height x width in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path, help="folder of the T5 tokenizer; default: an importable ComfyUI's")
    parser.add_argument("--sheet", type=Path, help="write pictures there as one PNG")
    return parser.parse_args()


def main() -> None:
    options = _parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    height_px, width_px = map(int, options.size.split("x"))
    scenes = evaluated_scenes(options.count, height_px, width_px, options.seed)
    pictures = make_pictures(options, scenes, height_px, width_px)
    readings = [read(picture) for picture in pictures]
    both = list(zip(readings, scenes, strict=True))
    labels = ("one icon", "two icons", "three icons")
    rows = {label: both[k::MOST_EVALUATED] for k, label in enumerate(labels)} | {"all": both}
    logger.info("%s\n", describe_rows({label: part for label, part in rows.items() if part}))
    logger.info("%s", describe_confusion(readings, scenes))
    if options.sheet:
        contact_sheet(pictures).save(options.sheet)


if __name__ == "__main__":
    main()
