"""Train the demo model from nothing, its autoencoder first.

`python dev.py run -m pixart_pack.demo.train --stage autoencoder --minutes 18`, then `--stage denoiser --minutes 100`.
"""

import argparse
import logging
from pathlib import Path

import torch

from .decoder_stage import DecoderStage, reconstruction_psnr
from .denoiser_stage import HOLD, DenoiserStage
from .loop import fit
from .text import load_tokenizer

FOLDER = Path(__file__).parent
MODELS = FOLDER / "models"
VAE_FILE = MODELS / "vae" / "pixart_demo_vae.safetensors"
DENOISER_FILE = MODELS / "diffusion_models" / "pixart_demo.safetensors"
TEXT_FILE = MODELS / "text_encoders" / "pixart_demo_t5.safetensors"
logger = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser, work: Path) -> None:
    """What every training asks for. work: the folder of checkpoints and logs, by default."""
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--work", type=Path, default=work, help="checkpoints and logs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path, help="folder of the T5 tokenizer; default: an importable ComfyUI's")
    parser.add_argument("--seed", type=int, default=0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo.train", description=__doc__)
    parser.add_argument("--stage", choices=("autoencoder", "denoiser"), required=True)
    parser.add_argument("--minutes", type=float, help="budget; the learning rate decays over it")
    parser.add_argument("--steps", type=int, help="budget in steps instead")
    add_options(parser, FOLDER / "work")
    return parser.parse_args()


def main() -> None:
    options = _parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    if options.stage == "autoencoder":
        stage = DecoderStage(seed=options.seed)
        fit(stage, options.work / "autoencoder", minutes=options.minutes, steps=options.steps, resume=options.resume)
        stage.export(VAE_FILE)
        logger.info("reconstruction: %.1f dB", reconstruction_psnr(stage.averaged()))
    else:
        stage = DenoiserStage(load_tokenizer(options.tokenizer), options.work / "pool", seed=options.seed)
        folder = options.work / "denoiser"
        fit(stage, folder, minutes=options.minutes, steps=options.steps, resume=options.resume, hold=HOLD)
        stage.export(DENOISER_FILE, TEXT_FILE)


if __name__ == "__main__":
    main()
