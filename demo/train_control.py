"""Train the demo's ControlNet with the pack's own trainer: `python dev.py run -m pixart_pack.demo.train_control`.

Goes on where it was stopped; checkpoints and log are in demo/work/control.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..pixart.controlnet import PixArtControlNet
from ..pixart.training.build import make_objective
from ..pixart.training.loop import Events, Progress, Trainer
from ..pixart.training.settings import TrainingSettings
from ..pixart.weights.controlnets import save_controlnet
from .control import FULL_BUCKETS, SMALL_BUCKETS, ControlFeatures
from .evaluate import load_model
from .evaluate_control import CONTROL_FILE, held_out_scenes, load_control, measure, steer
from .generate import DemoModel
from .pool import Bucket
from .train import FOLDER, add_options

SETTINGS = TrainingSettings(
    kind="controlnet",
    batch_size=32,
    weight_decay=0.0,
    schedule="cosine",
    floor=0.02,
    warmup_steps=50,
    ema_decay=0.99,
    weighting="velocity",
    timesteps="log_normal",  # most at the noise levels at which the layout is decided
    timestep_mean=0.4,
    timestep_std=1.0,
    control_blocks=5,
    checkpoint_every=50,
    log_every=20,
    sample_every=250,
    tensorboard=False,
)


@dataclass(frozen=True)
class Phase:
    """A part of the training: on which pictures, and for how long. shrink: see ControlFeatures."""

    name: str
    buckets: Sequence[Bucket]
    shrink: int
    steps: int
    learning_rate: float
    floor: float


# The position grid spans the same range at every size: small pictures teach to follow lines at a quarter of the cost.
PHASES = (
    Phase("small", SMALL_BUCKETS, 2, 1150, 1.5e-3, 0.3),
    Phase("full", FULL_BUCKETS, 1, 1000, 8e-4, 0.02),
)
CHECKED = 16  # held-out scenes that are measured on the way
logger = logging.getLogger(__name__)


class Bar(Events):
    """The training's progress on a terminal."""

    def __init__(self, steps: int):
        self.bar = tqdm(total=steps, unit="step", disable=not sys.stderr.isatty())

    def stepped(self, progress: Progress) -> None:
        self.bar.update(progress.step - self.bar.n)
        self.bar.set_postfix({"loss": f"{progress.smoothed:.4g}"}, refresh=False)


def train(
    model: DemoModel,
    settings: TrainingSettings,
    work: Path,
    path: Path,
    *,
    phases: Sequence[Phase] = PHASES,
    resume: bool = True,
    start: PixArtControlNet | None = None,
) -> None:
    """Train, or go on from what is in `work`, and write the ControlNet to `path` after each phase.

    start: a trained ControlNet, in place of a copy of the model's blocks.
    """
    config = model.denoiser.config
    objective = make_objective(model.denoiser, settings)
    if start is not None:
        objective.control.load_state_dict(start.state_dict())
    scenes = held_out_scenes(CHECKED, 128, 128, seed=1)

    def check(step: int) -> None:
        found = measure(steer(model, objective.control, scenes, 128, 128, steps=15), scenes)
        logger.info("step %d: %s", step, ", ".join(f"{name} {value:.3f}" for name, value in found.items()))

    for phase in phases:
        features = ControlFeatures(
            model.tokenizer, model.text, work / "features", buckets=phase.buckets, shrink=phase.shrink
        )
        chosen = replace(settings, steps=phase.steps, learning_rate=phase.learning_rate, floor=phase.floor)
        trainer = Trainer(objective, features, chosen, work / phase.name, events=Bar(phase.steps), sample=check)
        trainer.run(resume)
        weights = {name.removeprefix("control."): value for name, value in trainer.trained_weights().items()}
        objective.control.load_state_dict(weights)
        save_controlnet(path, weights, config, dtype=torch.float16)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo.train_control", description=__doc__)
    parser.add_argument("--steps", type=int, nargs=len(PHASES), default=[phase.steps for phase in PHASES])
    parser.add_argument("--output", type=Path, default=CONTROL_FILE)
    parser.add_argument("--continue-from", type=Path, help="a ControlNet of an earlier base: its last phase again")
    add_options(parser, FOLDER / "work" / "control")
    return parser.parse_args()


def main() -> None:
    options = _parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    phases = [replace(phase, steps=steps) for phase, steps in zip(PHASES, options.steps, strict=True)]
    start = None
    if options.continue_from:
        start, phases = load_control(options.continue_from), phases[-1:]
    settings = replace(SETTINGS, seed=options.seed)
    model = load_model(options.tokenizer)
    train(model, settings, options.work, options.output, phases=phases, resume=options.resume, start=start)


if __name__ == "__main__":
    main()
