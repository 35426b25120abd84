"""Train the demo model from nothing: one command for all its stages, to be stopped and repeated at will.

`python dev.py run -m pixart_pack.demo.icons.train` goes on with the stage that is next: the autoencoder; the pictures
encoded, and on them the denoiser with its text encoder; the decoder alone; the files.
"""

import argparse
import datetime
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..text import load_tokenizer
from .autoencoder_stage import AutoencoderStage
from .denoiser_stage import DenoiserStage
from .pool import FULL_BUCKETS, SMALL_BUCKETS, Pool
from .run import Stopped, read_checkpoint, run_stage

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixart-pack" / "demo-training"
STEPS = {"autoencoder": 8000, "denoiser": 60000, "decoder": 6000}
HOLDS = {"autoencoder": 0.5, "denoiser": 0.6, "decoder": 0.3}  # share of the steps at the full learning rate
MEASURE_EVERY = {"autoencoder": 400, "denoiser": 1000, "decoder": 400}
CROPS, SCENES = 16, 48  # in a batch
logger = logging.getLogger(__name__)


def deadline(until: str | None, minutes: float | None) -> Callable[[], bool]:
    """Whether the time of day `until` (HH:MM) has come, so many minutes have passed, or a signal asked to stop."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(True))
    end = float("inf") if minutes is None else time.time() + 60 * minutes
    if until:
        now = datetime.datetime.now()
        hour, minute = map(int, until.split(":"))
        then = now.replace(hour=hour, minute=minute, second=0)
        end = min(end, (then if then > now else then + datetime.timedelta(days=1)).timestamp())
    return lambda: bool(asked) or time.time() >= end


class Training:
    """The stages, each made when it is its turn, from what the earlier ones left in the work folder."""

    def __init__(self, options: argparse.Namespace, stop: Callable[[], bool]):
        self.options, self.stop = options, stop
        self.work = options.work
        factor = options.scale / math.sqrt(options.batch)
        self.steps = {name: max(1, round(steps * factor)) for name, steps in STEPS.items()}

    def autoencoder(self) -> AutoencoderStage:
        return self._autoencoder(encoder=True)

    def _autoencoder(self, encoder: bool) -> AutoencoderStage:
        size = CROPS * self.options.batch
        return AutoencoderStage(seed=self.options.seed, device=self.options.device, batch_size=size, encoder=encoder)

    def _trained_autoencoder(self) -> AutoencoderStage:
        stage = self.autoencoder()
        stage.load_state_dict(read_checkpoint(self.work / "autoencoder")["stage"])
        return stage

    def denoiser(self) -> DenoiserStage:
        seed, device = self.options.seed, self.options.device
        autoencoder = self._trained_autoencoder().averaged()
        pools = [
            Pool(group, self.work / "pool", autoencoder, seed=seed, device=device, stop=self.stop)
            for group in (SMALL_BUCKETS, FULL_BUCKETS)
        ]
        size = SCENES * self.options.batch
        options = {"steps": self.steps["denoiser"], "batch_size": size, "seed": seed, "device": device}
        return DenoiserStage(load_tokenizer(self.options.tokenizer), autoencoder, pools, **options)

    def decoder(self) -> AutoencoderStage:
        stage = self._autoencoder(encoder=False)
        stage.model.load_state_dict(self._trained_autoencoder().averaged().state_dict())
        return stage

    def run(self, name: str) -> None:
        """Train one stage to its end, unless it is there already, and write its files. Raises Stopped."""
        state = read_checkpoint(self.work / name)
        exported = self.work / "models" / f"{name}.done"
        if state and state["step"] >= self.steps[name] and exported.exists():
            return
        stage = getattr(self, name)()
        run_stage(
            stage,
            self.work / name,
            self.steps[name],
            hold=HOLDS[name],
            stop=self.stop,
            workers=self.options.workers,
            measure_every=MEASURE_EVERY[name],
        )
        self.export(name, stage)
        exported.touch()

    def export(self, name: str, stage: AutoencoderStage | DenoiserStage) -> None:
        """Write the stage's files under the work folder's models/, as a ComfyUI's model folders hold them."""
        models = self.work / "models"
        if isinstance(stage, AutoencoderStage):
            stage.export(models / "vae" / "pixart_demo_vae.safetensors")
        else:
            names = "diffusion_models/pixart_demo.safetensors", "text_encoders/pixart_demo_t5.safetensors"
            stage.export(*(models / each for each in names))
        logger.info("%s: written into %s", name, models)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo.icons.train", description=__doc__)
    parser.add_argument("--work", type=Path, default=FOLDER, help="checkpoints, logs and the finished files")
    parser.add_argument("--until", metavar="HH:MM", help="stop at this time of day")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    parser.add_argument("--stage", choices=tuple(STEPS), help="only this stage (default: all that are left, in turn)")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many steps (default: 1)")
    parser.add_argument("--batch", type=int, help="times as large batches, for the root as many steps (GPU: 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--workers", type=int, help="processes that draw batches (default: 0, with a GPU 8)")
    parser.add_argument("--tokenizer", type=Path, help="folder of the T5 tokenizer; default: an importable ComfyUI's")
    parser.add_argument("--export", choices=tuple(STEPS), help="write the files of a stage as it stands, and end")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    options.batch = options.batch or (1 if on_cpu else 8)
    options.workers = options.workers if options.workers is not None else (0 if on_cpu else 8)
    return options


def main() -> None:
    options = _parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    training = Training(options, deadline(options.until, options.minutes))
    if options.export:
        stage = getattr(training, options.export)()
        stage.load_state_dict(read_checkpoint(options.work / options.export)["stage"])
        training.export(options.export, stage)
        return
    try:
        for name in [options.stage] if options.stage else STEPS:
            training.run(name)
    except Stopped as stopped:
        logger.info("%s", stopped)


if __name__ == "__main__":
    main()
