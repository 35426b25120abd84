"""How far a reference picture decides what a caption leaves open, and how far it disturbs what the caption says.

`python dev.py run -m pixart_pack.demo.reference` prints a Markdown table: captions without a background, under
references of another scene each.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch

from ..pixart.reference.attention import Reference, ReferencedModel
from ..pixart.sampling import Captions, Settings, sample_latents
from .autoencoder import average_latents
from .decoder_stage import to_tensor
from .evaluate import contact_sheet, held_out_scenes, load_model
from .finetune import SIDE_PX, encode_captions, make_table
from .generate import GUIDANCE, DemoModel
from .scenes import BACKGROUNDS, Scene, caption, draw_scene
from .scorer import ATTRIBUTES, add_scores, score

WAY = "way to the reference's background"  # of the distance that pictures without it have
BATCH, STEPS = 20, 20
USES = {
    "none": None,
    "strength 1": {},
    "strength 1, first half": {"end": 0.5},
    "strength 0.25": {"strength": 0.25},
    "strength 3": {"strength": 3.0},
}
logger = logging.getLogger(__name__)


def without_background(scene: Scene) -> str:
    """The plain caption, its end left out."""
    return caption(scene).partition(" on a ")[0]


def make_references(scenes: Sequence[Scene]) -> list[Scene]:
    """For each scene another one, whose background it does not have by chance more often than others do."""
    rng = Random("references")
    others = list(scenes)
    rng.shuffle(others)
    return [Scene(list(BACKGROUNDS)[number % len(BACKGROUNDS)], other.items) for number, other in enumerate(others)]


@torch.no_grad()
def draw(model: DemoModel, scenes: Sequence[Scene], references: Sequence[Scene], use: dict | None) -> list[np.ndarray]:
    """A picture for each scene's caption without its background. use: fields of Reference, None for no reference."""
    settings, pictures = Settings(steps=STEPS, guidance=GUIDANCE), []
    nothing = encode_captions(model, [""])
    for start in range(0, len(scenes), BATCH):
        part = slice(start, start + BATCH)
        states = encode_captions(model, [without_background(scene) for scene in scenes[part]])
        called = model.denoiser
        if use is not None:
            latents = average_latents(to_tensor([draw_scene(scene) for scene in references[part]]))
            called = ReferencedModel(called, Reference.of(latents, **use))
        given = Captions.of(states), Captions.of(nothing * len(states))
        seeds = list(range(start, start + len(states)))
        made = sample_latents(called, *given, SIDE_PX, SIDE_PX, seeds, settings) * model.denoiser.config.vae_scale
        pictures += list((model.autoencoder.decode(made) * 255).round().byte().permute(0, 2, 3, 1).numpy())
    return pictures


def distances(pictures: Sequence[np.ndarray], references: Sequence[Scene]) -> np.ndarray:
    """How far each picture's commonest colour is from its reference's background, in steps of 255: (N,)."""
    found = np.array([np.median(picture.reshape(-1, 3), axis=0) for picture in pictures])
    return np.abs(found - np.array([BACKGROUNDS[reference.background] for reference in references])).mean(1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="demo.reference", description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path, help="folder of the T5 tokenizer; default: an importable ComfyUI's")
    parser.add_argument("--sheet", type=Path, help="write references and pictures as one PNG")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    model = load_model(options.tokenizer)
    scenes = held_out_scenes(options.count, SIDE_PX, SIDE_PX)
    references = make_references(scenes)
    sheet, rows, first = [draw_scene(scene) for scene in references[:10]], {}, None
    for label, use in USES.items():
        pictures = draw(model, scenes, references, use)
        sheet += pictures[:10]
        away = distances(pictures, references).mean()
        first = away if first is None else first
        right = add_scores(score(picture, scene) for picture, scene in zip(pictures, scenes, strict=True))
        rows[label] = {WAY: 1 - away / first, **right}
    logger.info("%s", make_table(rows, [WAY, *(name for name in ATTRIBUTES if name != "background")]))
    if options.sheet:
        contact_sheet(sheet).save(options.sheet)


if __name__ == "__main__":
    main()
