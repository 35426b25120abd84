"""Teach the demo model something new with the pack's own trainer, and measure what it learned and what it forgot.

`python dev.py run -m pixart_pack.demo.finetune lora | dreambooth | lcm | dmd` prints a Markdown table.

lora: a new shape under a new word, from 20 captioned pictures. dreambooth: a few pictures of one special thing of a
class, with and without pictures of the class beside them. lcm: pictures in 4 steps without guidance. dmd: in one.
"""

import argparse
import copy
import itertools
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..pixart.config import LATENT_DOWNSCALE
from ..pixart.data.examples import Example, ListFeatures
from ..pixart.data.pairs import noise_of
from ..pixart.sampling import Captions, Settings, sample_latents
from ..pixart.training.build import make_objective
from ..pixart.training.loop import Events, Progress, Trainer
from ..pixart.training.run import save_result
from ..pixart.training.settings import TrainingSettings
from .autoencoder import VAE_SCALE, average_latents
from .decoder_stage import to_tensor
from .evaluate import contact_sheet, held_out_scenes, load_model
from .generate import GUIDANCE, DemoModel, generate
from .scenes import POSITIONS, TRAINED_SHAPES, Item, Scene, caption, describe, draw_scene, random_scene
from .scorer import ATTRIBUTES, add_scores, score
from .text import encode_text, make_text_batch

SIDE_PX = 128
SHAPE, WORD = "heart", "zorp"  # what the model has never seen, and a word that it has never read
CLASS = "circle"
BATCH = 25
logger = logging.getLogger(__name__)

COMMON = TrainingSettings(
    schedule="cosine",
    warmup_steps=20,
    weighting="velocity",
    checkpoint_every=0,
    log_every=10,
    tensorboard=False,
)
AT_SHAPES = replace(COMMON, timesteps="log_normal", timestep_mean=0.4)  # most at the noise levels that decide shapes
LORA = replace(
    AT_SHAPES,
    kind="lora",
    targets="blocks",
    rank=16,
    learning_rate=1e-3,
    steps=1000,
    batch_size=24,
    prior_target="model",
)
DREAMBOOTH = replace(AT_SHAPES, kind="dreambooth", learning_rate=3e-4, steps=300, batch_size=20, weight_decay=0.0)
LCM = replace(
    COMMON,
    kind="lcm_lora",
    targets="blocks",
    rank=16,
    learning_rate=3e-4,
    steps=300,
    batch_size=32,
    loss="huber",
    weighting="none",
    caption_dropout=0.0,
    lcm_guidance=1.0,  # of the form x + w (x - null): guidance 2
)
DMD = replace(
    COMMON,
    kind="dmd_lora",
    targets="blocks",
    rank=32,
    learning_rate=1e-3,
    steps=80,
    batch_size=12,
    weighting="none",
    caption_dropout=0.0,
    dmd_guidance=2.0,
    dmd_regression=1.0,
)
LESSONS, TEST_PICTURES, OLD_PICTURES = 20, 50, 200
REMINDERS = 400  # pictures that the model makes of what it knows
SUBJECT_PICTURES, PRIOR_PICTURES = len(POSITIONS), 40  # the subject once in every place
DISTILLATION_SCENES = 1000
PAIRS, PAIR_STEPS = 128, 12
FEW_STEPS = (4, 1)


@dataclass(frozen=True)
class Sampling:
    """How pictures are made; see demo.generate."""

    steps: int = 20
    guidance: float = GUIDANCE
    sampler: str = "dpm_solver"
    schedule: str = "uniform"


class Bar(Events):
    """A training's progress on a terminal."""

    def __init__(self, steps: int):
        self.bar = tqdm(total=steps, unit="step", disable=not sys.stderr.isatty())

    def stepped(self, progress: Progress) -> None:
        self.bar.update(progress.step - self.bar.n)
        self.bar.set_postfix({"loss": f"{progress.smoothed:.4g}"}, refresh=False)


def scene_of_shape(rng: Random, count: int) -> Scene:
    """`count` shapes, one of which is a large SHAPE."""
    while True:
        scene = random_scene(rng, count, SIDE_PX, SIDE_PX, shapes=(*TRAINED_SHAPES, SHAPE))
        # Of a small one, too little is left in a latent of 8x8 pixels a cell.
        if [item.size for item in scene.items if item.shape == SHAPE] == ["large"]:
            return scene


def shape_of(scene: Scene) -> Item:
    """The scene's SHAPE."""
    return next(item for item in scene.items if item.shape == SHAPE)


def lesson_scenes(count: int) -> list[Scene]:
    """Scenes that show SHAPE in every place in turn: alone at first, then beside a shape that the model knows."""
    rng, scenes = Random("lessons"), []
    for number in range(count):
        place = list(POSITIONS)[number % len(POSITIONS)]
        is_alone = number < len(POSITIONS) or place == "center"  # which leaves no room for another
        scene = scene_of_shape(rng, 1 if is_alone else 2)
        while shape_of(scene).position != place:
            scene = scene_of_shape(rng, 1 if is_alone else 2)
        scenes.append(scene)
    return scenes


def new_scenes(seed: str, count: int, apart_from: Sequence[Scene] = ()) -> list[Scene]:
    """Scenes of SHAPE alone, of (colour, position) pairs that `apart_from` does not show."""
    rng, scenes = Random(seed), []
    known = {(shape_of(scene).colour, shape_of(scene).position) for scene in apart_from}
    while len(scenes) < count:
        scene = scene_of_shape(rng, 1)
        if (shape_of(scene).colour, shape_of(scene).position) not in known:
            scenes.append(scene)
    return scenes


@torch.no_grad()
def encode_captions(model: DemoModel, captions: Sequence[str]) -> list[Tensor]:
    """T5 states of each caption, (L, D)."""
    batches = (make_text_batch([text], model.tokenizer) for text in captions)
    return [encode_text(model.text, batch)[0] for batch in batches]


def make_features(
    model: DemoModel, pictures: Sequence[np.ndarray], captions: Sequence[str], prior_from: int | None = None
) -> ListFeatures:
    """Pictures (h, w, 3) uint8 with their captions, encoded. Those from number `prior_from` on are of the class."""
    latents = average_latents(to_tensor(list(pictures))) / VAE_SCALE
    states = encode_captions(model, captions)
    height, width = pictures[0].shape[:2]
    examples = [
        Example(
            latent=latent,
            caption=state,
            size_px=(height, width),
            aspect_ratio=height / width,
            is_prior=prior_from is not None and number >= prior_from,
        )
        for number, (latent, state) in enumerate(zip(latents, states, strict=True))
    ]
    return ListFeatures(examples)


def train(model: DemoModel, features: ListFeatures, settings: TrainingSettings, save_as: Path | None = None) -> float:
    """Train model.denoiser, which is changed. save_as: a file for the result. Returns the seconds that it took."""
    objective = make_objective(model.denoiser, settings)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(objective, features, settings, Path(folder), events=Bar(settings.steps))
        trainer.run(resume=False)
    taken_s = time.perf_counter() - began
    if save_as is not None:
        save_result(save_as, objective, trainer.trained_weights(), settings)
    objective.eval()
    return taken_s


def draw(
    model: DemoModel, scenes: Sequence[Scene], sampling: Sampling, say: Callable[[Scene], str] = caption, seed: int = 0
) -> list[np.ndarray]:
    """One picture for each scene's caption."""
    pictures = []
    for start in range(0, len(scenes), BATCH):
        captions = [say(scene) for scene in scenes[start : start + BATCH]]
        pictures += list(generate(model, captions, seed=seed + start, **vars(sampling)))
    return pictures


def make_reminders(model: DemoModel, scenes: Sequence[Scene]) -> tuple[list[Scene], list[np.ndarray]]:
    """The scenes that the model draws right, and its pictures of them: what a training is to keep.

    Four steps without guidance are as often right as twenty with it.
    """
    pictures = draw(model, scenes, Sampling(4, 1.0), seed=1000)
    right = [all(good == count for good, count in score(p, s).values()) for p, s in zip(pictures, scenes, strict=True)]
    return [list(itertools.compress(each, right)) for each in (scenes, pictures)]


def measure(pictures: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, float]:
    """Shares of right attributes, where SHAPE counts as a shape too; "all" is their mean."""
    shapes = (*TRAINED_SHAPES, SHAPE)
    shares = add_scores(score(picture, scene, shapes) for picture, scene in zip(pictures, scenes, strict=True))
    return {**shares, "all": sum(shares[name] for name in ATTRIBUTES) / len(ATTRIBUTES)}


def make_table(rows: dict[str, dict[str, float]], columns: Sequence[str]) -> str:
    """Markdown, shares in per cent."""
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    lines += [
        f"| {label} | " + " | ".join(f"{100 * shares[name]:.1f} %" if name in shares else "" for name in columns) + " |"
        for label, shares in rows.items()
    ]
    return "\n".join(lines)


def named(scene: Scene, name: str) -> str:
    """The scene's plain caption with another name for SHAPE."""
    return caption(scene).replace(SHAPE, name)


def teach_lora(model: DemoModel, settings: TrainingSettings, options: argparse.Namespace) -> str:
    """The table of a LoRA that teaches SHAPE as WORD, and what it did to the shapes that were known."""
    lessons = lesson_scenes(LESSONS)
    tests = new_scenes("tests", options.count or TEST_PICTURES, lessons)
    old = held_out_scenes(options.count or OLD_PICTURES, SIDE_PX, SIDE_PX)

    def say(scene):
        return named(scene, WORD)

    def look() -> tuple[dict, list]:
        new_pictures, old_pictures = draw(model, tests, Sampling(), say), draw(model, old, Sampling())
        new, known = measure(new_pictures, tests), measure(old_pictures, old)
        return {WORD: new["shape"], "its place": new["position"], "known shapes": known["shape"]}, new_pictures

    before, first = look()
    began = time.perf_counter()
    reminders, known = make_reminders(model, [random_scene(Random(f"known {k}"), 1 + k % 2) for k in range(REMINDERS)])
    pictures = [draw_scene(scene) for scene in lessons] + known
    captions = [say(scene) for scene in lessons] + [caption(scene) for scene in reminders]
    train(model, make_features(model, pictures, captions, LESSONS), settings, options.save)
    taken_s = time.perf_counter() - began
    after, second = look()
    save_sheet(options.sheet, first[:10] + second[:10])
    rows = {"before": before, f"after {taken_s / 60:.1f} minutes": after}
    return make_table(rows, [WORD, "its place", "known shapes"])


def teach_dreambooth(model: DemoModel, settings: TrainingSettings, options: argparse.Namespace) -> str:
    """The table of a whole model trained on a special CLASS (which has the form of SHAPE), without and with priors."""
    lessons = lesson_scenes(SUBJECT_PICTURES)
    tests = new_scenes("tests", options.count or TEST_PICTURES, lessons)
    rng = Random("class")
    shown = [random_scene(rng, 1, shapes=[CLASS]) for _ in range(PRIOR_PICTURES + (options.count or TEST_PICTURES))]
    priors, classes = shown[:PRIOR_PICTURES], shown[PRIOR_PICTURES:]
    subject = f"{WORD} {CLASS}"

    def say(scene):
        return named(scene, subject)

    def look() -> dict[str, float]:
        new = measure(draw(model, tests, Sampling(), say), tests)
        kept = measure(draw(model, classes, Sampling()), classes)
        return {subject: new["shape"], CLASS: kept["shape"]}

    rows = {"before": look()}
    untrained = copy.deepcopy(model.denoiser)
    own = [draw_scene(scene) for scene in lessons]
    priors, of_class = make_reminders(model, priors)  # by the model itself, as DreamBooth does
    for label, pictures, scenes, batch_size in (
        ("without pictures of the class", own, lessons, settings.batch_size // 2),
        ("with pictures of the class", own + of_class, lessons + priors, settings.batch_size),  # half of each
    ):
        model.denoiser = copy.deepcopy(untrained)
        captions = [say(scene) if number < len(own) else caption(scene) for number, scene in enumerate(scenes)]
        train(model, make_features(model, pictures, captions, len(own)), replace(settings, batch_size=batch_size))
        rows[label] = look()
    return make_table(rows, [subject, CLASS])


def teach_lcm(model: DemoModel, settings: TrainingSettings, options: argparse.Namespace) -> str:
    """The table of an LCM-LoRA: what is right in pictures of few steps without guidance."""
    tests = held_out_scenes(options.count or OLD_PICTURES, SIDE_PX, SIDE_PX)
    rng = Random("distillation")
    scenes = [random_scene(rng, 1 + number % 3) for number in range(options.scenes or DISTILLATION_SCENES)]

    def look(sampling: Sampling) -> dict[str, float]:
        pictures.append(draw(model, tests, sampling))
        return measure(pictures[-1], tests)

    pictures: list[list[np.ndarray]] = []
    rows = {f"steps 20, guidance {GUIDANCE:g}": look(Sampling())}
    for few in FEW_STEPS:
        rows[f"steps {few}, guidance {GUIDANCE:g}"] = look(Sampling(few))
        rows[f"steps {few}, guidance 1"] = look(Sampling(few, 1.0))
    captions = [describe(scene, rng) for scene in scenes]
    taken_s = train(model, make_features(model, [draw_scene(s) for s in scenes], captions), settings, options.save)
    for few in FEW_STEPS:
        label = f"LCM-LoRA of {taken_s / 60:.1f} minutes: steps {few}, guidance 1"
        rows[label] = look(Sampling(few, 1.0, "lcm", "lcm"))
    save_sheet(options.sheet, [picture for part in pictures for picture in part[:10]])
    return make_table(rows, [*ATTRIBUTES, "all"])


@torch.no_grad()
def make_pairs(model: DemoModel, scenes: Sequence[Scene], captions: Sequence[str], sampling: Sampling) -> ListFeatures:
    """Noises, and what the model makes of them in many steps."""
    states, examples, side = encode_captions(model, captions), [], SIDE_PX // LATENT_DOWNSCALE
    settings = Settings(sampling.sampler, sampling.schedule, sampling.steps, sampling.guidance)
    nothing = encode_captions(model, [""])
    for start in range(0, len(scenes), BATCH):
        part, seeds = states[start : start + BATCH], list(range(start, start + BATCH))[: len(states) - start]
        given = Captions.of(part), Captions.of(nothing * len(part))
        latents = sample_latents(model.denoiser, *given, SIDE_PX, SIDE_PX, seeds, settings)
        for seed, state, latent in zip(seeds, part, latents, strict=True):
            examples.append(Example(latent, state, (SIDE_PX, SIDE_PX), 1.0, noise=noise_of(seed, (4, side, side))))
    return ListFeatures(examples)


def teach_dmd(model: DemoModel, settings: TrainingSettings, options: argparse.Namespace) -> str:
    """The table of a generator by distribution matching: what is right in pictures of one step without guidance."""
    tests = held_out_scenes(options.count or OLD_PICTURES, SIDE_PX, SIDE_PX)
    rng = Random("distillation")
    scenes = [random_scene(rng, 1 + number % 3) for number in range(options.scenes or PAIRS)]
    captions = [describe(scene, rng) for scene in scenes]
    one = Sampling(1, 1.0, "dmd", "dmd")
    pictures = [draw(model, tests, sampling) for sampling in (Sampling(), one)]
    rows = {f"steps 20, guidance {GUIDANCE:g}": measure(pictures[0], tests), "steps 1": measure(pictures[1], tests)}
    began = time.perf_counter()
    pairs = make_pairs(model, scenes, captions, Sampling(PAIR_STEPS, settings.dmd_guidance))
    made_s = time.perf_counter() - began
    taken_s = train(model, pairs, settings, options.save)
    pictures.append(draw(model, tests, one))
    rows[f"DMD of {made_s / 60:.1f} + {taken_s / 60:.1f} minutes: steps 1"] = measure(pictures[-1], tests)
    save_sheet(options.sheet, [picture for part in pictures for picture in part[:10]])
    return make_table(rows, [*ATTRIBUTES, "all"])


def save_sheet(path: Path | None, pictures: list[np.ndarray]) -> None:
    """Ten pictures in a row."""
    if path is not None:
        sheet: Image.Image = contact_sheet(pictures)
        sheet.save(path)


LESSON_KINDS = {
    "lora": (teach_lora, LORA),
    "dreambooth": (teach_dreambooth, DREAMBOOTH),
    "lcm": (teach_lcm, LCM),
    "dmd": (teach_dmd, DMD),
}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo.finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=list(LESSON_KINDS))
    parser.add_argument("--steps", type=int, help="of training; default: what the README's table was made with")
    parser.add_argument("--count", type=int, help="pictures for each figure of the table")
    parser.add_argument("--scenes", type=int, help="pictures to distil from (lcm, dmd)")
    parser.add_argument("--save", type=Path, help="write the LoRA to this .safetensors file")
    parser.add_argument("--sheet", type=Path, help="write pictures from before and after as one PNG")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path, help="folder of the T5 tokenizer; default: an importable ComfyUI's")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    teach, settings = LESSON_KINDS[options.kind]
    settings = replace(settings, steps=options.steps or settings.steps)
    logger.info("%s", teach(load_model(options.tokenizer), settings, options))


if __name__ == "__main__":
    main()
