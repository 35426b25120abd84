"""`python -m pixart encode`: encode a dataset outside ComfyUI, in one process or shared out among many."""

import argparse
import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..data import cache, records, sources
from ..data.features import open_features
from ..data.identity import digest, fingerprint
from ..data.original_features import write_original_features
from ..data.storage.index import MANIFEST
from ..data.storage.table import RecordTable
from ..data.streams.writing import write_stream
from ..encoders.autoencoder import load_autoencoder
from ..encoders.edges import canny_edges, soft_edges
from ..encoders.hed import detect_edges, make_hed
from ..encoders.t5 import find_tokenizer, load_text_encoder
from ..quoting import shorten
from ..text import count_tokens, load_tokenizer, tokenizer_file
from ..weights.folders import TEXT_ENCODER_STEMS, TRANSFORMER_STEMS
from ..weights.reading import read_tensors
from ..weights.saving import DTYPES
from .console import add_device, make_parser, own_device, process_rank
from .variety import add_variety, source_options, with_variety

log = logging.getLogger(__name__)

EDGES = {"soft": soft_edges, "canny": canny_edges}
DESCRIPTION = """Encode captions and pictures once, so that training needs neither T5 nor the autoencoder. What the
output folder holds already is not encoded again. With `accelerate launch` (or RANK and WORLD_SIZE set) each process
encodes its share, and the one that finishes last writes the list of the dataset."""
EXAMPLES = """examples:
  python -m pixart encode pictures/ --output features/ --text-encoder t5-v1_1-xxl/ --vae sd-vae-ft-ema/
  python -m pixart encode captions.csv --output features/ --text-encoder t5xxl_fp16.safetensors \\
      --tokenizer t5/ --vae vae.safetensors --resolution 512 --flip --batch-size 8
  accelerate launch --multi_gpu -m pixart encode pictures/ --output features/ --text-encoder t5/ --vae vae/"""


def parse() -> argparse.ArgumentParser:
    parser = make_parser("encode", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add("dataset", type=Path, help="folder of pictures with .txt captions, table, or any of --kind")
    add("--output", type=Path, required=True, help="folder of the encoded dataset; it may hold others")
    add("--name", default=MANIFEST, help="name of the dataset's list in it (default: %(default)s)")
    add("--text-encoder", type=Path, required=True, help="T5 file or folder")
    add("--tokenizer", type=Path, help="its folder (default: beside the text encoder, or in COMFYUI_PATH)")
    add("--vae", type=Path, required=True, help="autoencoder file or folder")
    add("--vae-dtype", choices=list(DTYPES), default="fp32", help="default: %(default)s")
    add("--share", type=_share, metavar="I/N", help="encode the Ith of N shares; the last one writes the list of all")
    add("--batch-size", type=int, default=1, help="pictures at once (default: %(default)s)")
    add_device(parser)
    _add_dataset_options(parser.add_argument_group("dataset"))
    _add_settings(parser.add_argument_group("encoding"))
    add_variety(parser)
    return parser


def _add_dataset_options(group) -> None:
    add = group.add_argument
    add("--kind", choices=sources.KINDS, default=sources.AUTO, help="default: %(default)s")
    for name in ("picture", "caption", "control"):
        add(f"--{name}-column", default="", help="default: by the usual names")
    add("--control-folder", type=Path, help="control pictures under the names of the pictures")
    add("--smallest", type=int, default=0, metavar="PX", help="leave out pictures with a shorter side below this")
    add("--problems", choices=records.POLICIES, default=records.POLICIES[0], help="default: %(default)s")
    add("--caption", default="", help="for pictures without a caption")
    add("--prior", type=Path, help="dataset of the class that DreamBooth is to keep")
    add("--prior-caption", default="", help="for its pictures without a caption")


def _add_settings(group) -> None:
    add, usual = group.add_argument, cache.EncodeSettings()
    add(
        "--resolution",
        type=int,
        nargs="+",
        default=[usual.base_px],
        metavar="PX",
        help=f"trained size, or several for one training (default: {usual.base_px})",
    )
    add("--spread", choices=cache.SPREADS, default=usual.spread, help="of several sizes: into each, or the nearest")
    add("--square", action="store_true", help="all pictures into the square bin")
    add("--flip", action="store_true", help="add the mirrored picture of each")
    add("--caption-length", type=int, default=usual.caption_length, help="120 for alpha, 300 for Sigma")
    add("--clean", action="store_true", help="clean captions as PixArt-alpha's were")
    add("--caption-dtype", choices=cache.CAPTION_DTYPES, default=usual.caption_dtype, help="default: %(default)s")
    add("--size-condition", choices=cache.SIZE_CONDITIONS, default=usual.size_condition, help="default: %(default)s")
    edges = group.add_mutually_exclusive_group()
    edges.add_argument("--edges", choices=list(EDGES), help="hints for pictures without a control picture")
    edges.add_argument("--hed", type=Path, help="the same by the HED network of this file")
    add("--original-layout", type=Path, metavar="FOLDER", help="write PixArt-alpha's .npz and .npy files too")
    add("--force", action="store_true", help="write them over those of a folder that has some")
    add("--stream", type=Path, metavar="FOLDER", help="write tar files too, which a training reads over a network")


def main(options: argparse.Namespace) -> None:
    """Encode this process's share. Raises ValueError and OSError for bad input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.batch_size < 1:
        raise ValueError(f"Batch size out of range: got {options.batch_size}, expected at least 1. Enter 1 or more.")
    original = options.original_layout
    if original and not options.force and original.is_dir() and any(original.iterdir()):
        raise FileExistsError(
            f"Exists already: got {shorten(str(original), 300)}, expected a new folder. Use --force to write over it."
        )
    if original and len(options.resolution) > 1:
        raise ValueError(
            f"Original layout holds one size: got {len(options.resolution)} in --resolution, expected one. Leave "
            f"--original-layout out, or encode one size."
        )
    rank, world_size = process_rank()
    settings = _settings(options)
    make_hint, hint_identity = _hints(options)
    text_identity = _identify_text_encoder(options)
    image_identity = digest(_identify(options.vae, TRANSFORMER_STEMS), options.vae_dtype)
    dataset = _read(options)
    if rank == 0:
        log.info(dataset.report)
    with _Bar("comparing") as bar:
        encoder = cache.DatasetEncoder(
            dataset.records,
            options.output,
            settings,
            text_identity,
            image_identity,
            hint_identity,
            rank,
            world_size,
            progress=bar,
        )
    _encode(encoder, options, make_hint)
    _finish(encoder, options, settings, is_alone=world_size == 1)


def _settings(options: argparse.Namespace) -> cache.EncodeSettings:
    return cache.EncodeSettings(
        options.resolution[0],
        options.square,
        options.flip,
        options.caption_length,
        options.clean,
        options.caption_dtype,
        options.size_condition,
        tuple(options.resolution[1:]),
        options.spread,
    )


def _read(options: argparse.Namespace) -> records.Dataset:
    columns = sources.Columns(options.picture_column, options.caption_column, options.control_column)
    more = {"control_folder": options.control_folder, **source_options(options)}
    own = sources.read_dataset(options.dataset, options.kind, columns, **more)
    dataset = _check(_own_share(own, options.share), options, fallback_caption=options.caption)
    dataset = with_variety(dataset, options)
    if options.prior is None:
        return dataset
    prior = _own_share(sources.read_dataset(options.prior, columns=columns), options.share, len(own))
    return dataset + _check(prior, options, fallback_caption=options.prior_caption, is_prior=True)


def _share(text: str) -> tuple[int, int]:
    which, _, count = text.partition("/")
    share = int(which), int(count)
    if not 1 <= share[0] <= share[1]:
        raise ValueError
    return share


def _own_share(found: RecordTable, share: tuple[int, int] | None, first: int = 0) -> RecordTable:
    """Every Nth record, numbered as in the whole source."""
    if share is None:
        return found
    numbers = range(share[0] - 1, len(found), share[1])
    return RecordTable(replace(found[number], number=first + number) for number in numbers)


def _check(found: RecordTable, options: argparse.Namespace, **checks) -> records.Dataset:
    with _Bar("checking") as bar:
        return records.check_records(
            found, smallest_px=options.smallest, policy=options.problems, progress=bar, **checks
        )


def _encode(encoder: cache.DatasetEncoder, options: argparse.Namespace, make_hint) -> None:
    device = own_device(options.device)
    if len(encoder.missing_captions):
        text_encoder = load_text_encoder(options.text_encoder, options.tokenizer, DTYPES[options.dtype], device)
        with _Bar("captions") as bar:
            encoder.encode_captions(functools.partial(text_encoder, caption_length=options.caption_length), bar)
        del text_encoder
    if len(encoder.missing_pictures):
        autoencoder = load_autoencoder(options.vae, DTYPES[options.vae_dtype], device)

        @torch.no_grad()
        def encode_image(pixels):
            return autoencoder.encode(pixels.movedim(-1, 1) * 2 - 1)

        with _Bar("pictures") as bar:
            encoder.encode_pictures(encode_image, options.batch_size, make_hint, bar)


def _finish(encoder, options: argparse.Namespace, settings: cache.EncodeSettings, is_alone: bool) -> None:
    tokenizer = functools.cache(lambda: load_tokenizer(options.tokenizer or find_tokenizer(options.text_encoder)))
    notes = encoder.describe_cut(lambda text: count_tokens(text, tokenizer()))
    try:
        missing = encoder.write_share(options.share, options.name, notes) if options.share else []
        if missing:
            log.info("Share %d of %d is encoded; not yet: %s", *options.share, ", ".join(map(str, missing)))
            return
        features = (
            open_features(options.output / options.name) if options.share else encoder.features(options.name, notes)
        )
    except FileNotFoundError as error:
        if is_alone:
            raise
        log.info("This process's share is encoded; others are not done yet. (%s)", error)
        return
    log.info("%d pictures are encoded in %s", len(features), options.output)
    for note in notes:
        log.warning("%s", note)
    if options.original_layout:
        write_original_features(
            features, options.original_layout, settings.base_px, settings.square, settings.caption_length
        )
    if options.stream:
        with _Bar("stream") as bar:
            write_stream(features, options.stream, progress=bar)


def _identify_text_encoder(options: argparse.Namespace) -> str:
    """By its weights, their precision and the tokenizer. Raises FileNotFoundError."""
    weights = _identify(options.text_encoder, TEXT_ENCODER_STEMS)
    tokenizer = tokenizer_file(options.tokenizer or find_tokenizer(options.text_encoder))
    return digest(weights, options.dtype, tokenizer.read_bytes())


def _identify(path: Path, stems: tuple[str, ...]) -> str:
    """A model's identity by its weights, of which only a few pages are read. Raises FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(
            f"Model not found: got {shorten(str(path), 300)}, expected a file or folder. Correct the path."
        )
    return fingerprint(read_tensors(path, stems)[0].items())


def _hints(options: argparse.Namespace) -> tuple[Callable | None, str]:
    """(what makes hints of pictures, its identity), or (None, "")."""
    if options.hed:
        network = make_hed(read_tensors(options.hed)[0], options.hed.name)
        return functools.partial(_draw, functools.partial(detect_edges, network)), fingerprint(
            network.state_dict().items()
        )
    return (functools.partial(_draw, EDGES[options.edges]), options.edges) if options.edges else (None, "")


@torch.no_grad()
def _draw(edges: Callable, pixels: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) -> edges of the same shape."""
    return edges(pixels.movedim(-1, 1)).movedim(1, -1).expand_as(pixels)


class _Bar:
    """A progress bar as a cache.Progress."""

    def __init__(self, what: str):
        from tqdm import tqdm

        self._bar = tqdm(desc=what)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def __call__(self, done: int, total: int, picture: torch.Tensor | None) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
