"""Train the demo model from nothing, its autoencoder first.

`python dev.py run -m pixart_pack.demo.train --stage autoencoder --minutes 18`, then `--stage denoiser --minutes 100`.
"""

import argparse
import logging
from pathlib import Path

import torch

from .decoder_stage import DecoderStage, reconstruction_psnr
from .denoiser_stage import FROM_NOTHING, FROM_WEIGHTS, DenoiserStage
from .generate import load_autoencoder, load_denoiser, load_text_encoder
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
    parser.add_argument("--batch", type=int, default=48, help="pictures of full size in a step of the denoiser's")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster on processors with AMX")
    parser.add_argument(
        "--continue-from", type=Path, metavar="MODELS", help="a folder such as demo/models: train its denoiser further"
    )
    add_options(parser, FOLDER / "work")
    return parser.parse_args()


def train_denoiser(options: argparse.Namespace) -> None:
    """The stage of the denoiser and the text encoder, from nothing or from the weights of a folder."""
    trained = options.continue_from
    plan = FROM_WEIGHTS if trained else FROM_NOTHING
    how = {"seed": options.seed, "half": options.bf16, "batch_size": options.batch}
    if VAE_FILE.exists():
        how["autoencoder"] = load_autoencoder(VAE_FILE)
    stage = DenoiserStage(load_tokenizer(options.tokenizer), options.work / "pool", plan=plan, **how)
    if trained:
        denoiser_file, text_file = (trained / file.relative_to(MODELS) for file in (DENOISER_FILE, TEXT_FILE))
        stage.start_from(load_denoiser(denoiser_file), load_text_encoder(text_file))
    folder = options.work / ("denoiser_continued" if trained else "denoiser")
    fit(stage, folder, minutes=options.minutes, steps=options.steps, resume=options.resume, hold=plan.hold)
    stage.export(DENOISER_FILE, TEXT_FILE)


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
        train_denoiser(options)


if __name__ == "__main__":
    main()
