"""Train the demo model from nothing: one command for all its stages, to be stopped and repeated at will.

`python dev.py run -m pixart_pack.demo.icons.train` goes on with the stage that is next.
"""

import argparse
import datetime
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .autoencoder_stage import AutoencoderStage
from .run import run_stage

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixart-pack" / "demo-training"
STEPS = {"autoencoder": 14000, "decoder": 5000}
HOLDS = {"autoencoder": 0.5, "decoder": 0.3}
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


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo.icons.train", description=__doc__)
    parser.add_argument("--work", type=Path, default=FOLDER, help="checkpoints and logs")
    parser.add_argument("--until", metavar="HH:MM", help="stop at this time of day")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    parser.add_argument("--stage", choices=tuple(STEPS), help="only this stage (default: all, one after another)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--workers", type=int, help="processes that draw pictures (default: 0, with a GPU 8)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = _parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    stop = deadline(options.until, options.minutes)
    workers = options.workers if options.workers is not None else 8 * (options.device != "cpu")
    for name in [options.stage] if options.stage else STEPS:
        stage = AutoencoderStage(seed=options.seed, device=options.device)
        if not run_stage(stage, options.work / name, STEPS[name], hold=HOLDS[name], stop=stop, workers=workers):
            logger.info("stopped; the same command goes on")
            return


if __name__ == "__main__":
    main()
