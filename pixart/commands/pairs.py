"""Make pairs of noises and pictures for the training of a model of one step (kind dmd or dmd_lora).

    python -m pixart pairs --model PixArt-XL-2-512x512.pth --features features/ --output pairs/ --count 10000
    python -m pixart pairs --model model.safetensors --features features/ --output pairs/ \\
        --preset "alpha DPM-Solver++ 20"

A teacher samples the captions and sizes of an encoded dataset in many steps. The folder is then the dataset of the
training. A run that was ended goes on: what the folder holds is not made again.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from ..data.features import open_features
from ..data.identity import fingerprint
from ..data.pairs import write_pairs
from ..quoting import shorten
from ..sampling import Captions, Settings, sample_latents
from ..transformer import PixArt
from ..weights.reading import read_checkpoint
from ..weights.saving import DTYPES
from .console import add_device, add_weights, make_parser, tell
from .sample import add_settings, read_settings

log = logging.getLogger(__name__)


def parse() -> argparse.ArgumentParser:
    parser = make_parser("pairs", __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="the teacher: a checkpoint file, or a diffusers folder")
    add("--variant", help="which released model it is, such as alpha-512, where the file does not say")
    add("--features", type=Path, required=True, help="encoded dataset whose captions and sizes are sampled")
    add("--output", type=Path, required=True, help="folder of the pairs")
    add("--count", type=int, help="how many pairs; default: one for each picture of the dataset")
    add("--batch", type=int, default=1, help="pairs at a time (default: %(default)s)")
    add_weights(parser)
    add_device(parser)
    add_settings(parser)
    return parser


def main(options: argparse.Namespace) -> None:
    """Writes the pairs. Raises ValueError and OSError for bad input."""
    from tqdm import tqdm

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    features, settings = open_features(options.features), read_settings(options)
    count = len(features) if options.count is None else options.count
    if min(count, options.batch) < 1:
        raise ValueError(f"Number out of range: got {min(count, options.batch)}, expected at least 1. Enter 1 or more.")
    hints = {"variant": options.variant} if options.variant else {}
    checkpoint = read_checkpoint(options.model, weights=options.weights, **hints)
    tell(options.model.name, checkpoint.remarks)
    teacher = {"model": fingerprint(checkpoint.state_dict.items()), "dtype": options.dtype, "settings": str(settings)}
    model = PixArt(checkpoint.config, device="meta")
    weights = {name: each.to(options.device, DTYPES[options.dtype]) for name, each in checkpoint.state_dict.items()}
    model.load_state_dict(weights, assign=True)
    if features[0].caption.shape[-1] != checkpoint.config.caption_channels:
        raise ValueError(
            f"Caption width mismatch: got {features[0].caption.shape[-1]}, expected "
            f"{checkpoint.config.caption_channels}. Choose a dataset that was encoded for this model."
        )
    make = _sampler(model.eval().requires_grad_(False), features.null_caption, settings, options)
    with tqdm(total=count, unit="pair") as bar:

        def advance(done: int, missing: int) -> None:
            bar.n = max(bar.n, count - missing)
            bar.update(done)

        pairs = write_pairs(options.output, features, make, teacher, count, options.seed, options.batch, advance)
    log.info("%d pairs: %s", len(pairs), shorten(str(options.output), 300))


def _sampler(model: PixArt, null: torch.Tensor | None, settings: Settings, options) -> Callable:
    """What makes latents of captions. Raises ValueError for guidance without a null caption."""
    like = next(model.parameters())
    if null is None and model.has_null_caption:
        null = model.y_embedder.y_embedding
    if null is None and not 0 <= settings.guidance <= 1:
        raise ValueError(
            "No null caption: got a model without a learned one and a dataset without the empty caption's states, "
            "expected one of them. Encode the dataset again, or set --guidance 1."
        )

    def make(captions, size_px, seeds):
        positive = _captions(captions, like)
        negative = positive if null is None else _captions([null] * len(captions), like)
        return sample_latents(model, positive, negative, *size_px, seeds, settings, keep=True)

    return make


def _captions(states, like: torch.Tensor) -> Captions:
    captions = Captions.of(states)
    return Captions(captions.states.to(like), captions.mask.to(like.device))
