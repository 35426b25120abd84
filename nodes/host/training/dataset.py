"""Training data from the host's folders, and from pictures, latents and captions that are in the graph already."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import folder_paths
import torch

from ....pixart.config import LATENT_DOWNSCALE
from ....pixart.data.buckets import Bins
from ....pixart.data.examples import Example, FeatureSet, ListFeatures
from ....pixart.data.features import open_features
from ....pixart.data.pictures import FilePicture, RowPicture, TensorPicture
from ....pixart.data.records import Dataset, Record, check_records
from ....pixart.data.sources import AUTO, Columns, read_dataset, walk_files
from ....pixart.data.storage.table import RecordTable
from ....pixart.data.variety.masks import NONE
from ....pixart.resolution import nearest_ratio
from ..denoiser.latent import CHANNELS
from ..folders import find_typed, hide_paths, is_inner, open_paths
from ..progress import show_progress
from ..server.users import own_output

_RATIO_TABLE_PX = 1024  # every table has the same ratios


@dataclass(frozen=True)
class Source:
    """A dataset as it is typed: where and what it is, and what else of it is read (see sources.read_dataset)."""

    path: str
    kind: str = AUTO
    columns: Columns = Columns()
    control_folder: str = ""
    named_repeats: bool = False
    masks: str = NONE
    mask_folder: str = ""


def load_dataset(source: Source, **checks) -> Dataset:
    """Read and check the dataset at a typed path. checks: options of records.check_records."""
    records = _read(source)
    dataset = check_records(records, progress=show_progress(len(records)), **checks)
    return replace(dataset, report=hide_paths(dataset.report))


def _read(source: Source) -> RecordTable:
    root = folder_paths.get_input_directory()
    found = find_typed(source.path, root, "Dataset")
    beside = {"control_folder": source.control_folder, "mask_folder": source.mask_folder}
    whats = {"control_folder": "Control folder", "mask_folder": "Mask folder"}
    options = {name: find_typed(typed, root, whats[name]).path for name, typed in beside.items() if typed.strip()}
    options |= {"confined": found.is_confined, "shows_cells": found.is_known}
    options |= {"named_repeats": source.named_repeats, "masks": source.masks}
    records = read_dataset(found.path, source.kind, source.columns, **options)
    is_open = open_paths()
    return RecordTable(record if all(map(is_open, _files_of(record))) else _closed(record) for record in records)


def _files_of(record: Record) -> list[Path]:
    pictures = (record.picture, record.control, record.mask)
    return [picture.path for picture in pictures if isinstance(picture, FilePicture)]


def _closed(record: Record) -> Record:
    """A record without its files, since a link leads to them that prompts may not follow."""
    return replace(
        record, picture=None, control=None, mask=None, problem="a link leads out of the folders open to prompts"
    )


def fingerprint_dataset(source: Source) -> str:
    """A hash of what load_dataset would read: captions, and the names, sizes and times of files.

    A dataset that is not there or cannot be read counts for nothing.
    """
    try:
        records = _read(source)
    except (OSError, ValueError, ImportError):
        return ""
    files = [file for record in records for file in _files_of(record)]
    if any(isinstance(record.picture, RowPicture) for record in records):
        found = find_typed(source.path, folder_paths.get_input_directory(), "Dataset").path
        files += walk_files(found) if found.is_dir() else [found]
    return _hash_files(
        files, repr([(each.name, each.caption, each.others, each.repeats, each.problem) for each in records])
    )


def fingerprint_features(path: str) -> str:
    """A hash of the names, sizes and times of all files of the encoded dataset at a typed path."""
    try:
        found = _find_features(path)
    except (OSError, ValueError):
        return ""
    return _hash_files(walk_files(found if found.is_dir() else found.parent))


def _hash_files(files: Iterable[Path], text: str = "") -> str:
    state = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)
    for file in files:
        try:
            stat = file.stat()
        except OSError:  # gone meanwhile
            continue
        state.update(f"{file}|{stat.st_size}|{stat.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
    return state.hexdigest()


def dataset_of_images(images: Sequence, captions: Sequence[str], controls: Sequence = (), **checks) -> Dataset:
    """A dataset of IMAGEs and captions: one for each picture, or one for all; a single text may hold one a line.

    controls: IMAGEs of as many control pictures, or none. checks: options of records.check_records.
    Raises ValueError for other numbers of captions or of control pictures.
    """
    pictures, hints = _pictures(images), _pictures(controls)
    texts = _share_out(captions, len(pictures))
    if hints and len(hints) != len(pictures):
        raise ValueError(
            f"Wrong number of control pictures: got {len(hints)}, expected {len(pictures)}, one for each picture. "
            f"Connect as many, or none."
        )
    return check_records(
        [
            Record(f"picture {index + 1}", picture, texts[index], hints[index] if hints else None)
            for index, picture in enumerate(pictures)
        ],
        **checks,
    )


def _pictures(images: Sequence) -> list[TensorPicture]:
    return [TensorPicture(row) for image in images for row in image.detach().cpu()]


def _share_out(captions: Sequence[str], count: int) -> list[str]:
    captions = list(captions)
    if len(captions) == 1 and count > 1:
        lines = [line for line in captions[0].splitlines() if line.strip()]
        captions = lines * count if len(lines) == 1 else lines
    if len(captions) != count:
        raise ValueError(
            f"Wrong number of captions: got {len(captions)}, expected {count}, one for each picture, or 1 for all. "
            f"Write one a line, or connect a list of as many."
        )
    return captions


def features_of_latents(latents: Sequence[dict], conditioning: Sequence[list], empty: list | None) -> FeatureSet:
    """Features of LATENTs and CONDITIONINGs, as the host's nodes for training datasets give them; nothing is encoded.

    A CONDITIONING has one entry for each latent of its LATENT, or one whose captions are as many, or one caption for
    all; so a single CONDITIONING serves all LATENTs. empty: the CONDITIONING of the empty caption, or None.
    Raises ValueError for other numbers, latents of other channels, and captions of several widths.
    """
    if len(conditioning) == 1:
        conditioning = [*conditioning] * len(latents)
    if not latents or len(latents) != len(conditioning):
        raise ValueError(
            f"Latents and captions do not match: got {len(latents)} and {len(conditioning)}, expected as many of "
            f"both, and at least one. Connect the two outputs of one node."
        )
    with torch.inference_mode(False):  # tensors of an inference mode cannot be trained with
        examples = [
            _example(latent, caption)
            for one, captions in zip(latents, conditioning, strict=True)
            for latent, caption in zip(_rows(one), _captions(captions, len(one["samples"])), strict=True)
        ]
        null_caption = None if empty is None else _captions(empty, 1)[0]
    widths = {example.caption.shape[-1] for example in examples}
    if len(widths) > 1:
        raise ValueError(
            f"Captions of several widths: got {sorted(widths)}, expected one. Encode all with one text encoder."
        )
    return ListFeatures(examples, null_caption)


def _rows(latent: dict) -> list[torch.Tensor]:
    samples = latent["samples"]
    if samples.ndim != 4 or samples.shape[1] != CHANNELS:
        raise ValueError(
            f"Wrong latent: got the shape {tuple(samples.shape)}, expected (B, {CHANNELS}, h, w). Encode the pictures "
            f"with the VAE of PixArt: sd-vae-ft-ema for alpha, the SDXL VAE for Sigma."
        )
    return [row.detach().cpu().float().clone() for row in samples]


def _captions(conditioning: list, count: int) -> list[torch.Tensor]:
    """count captions (L, D), without what their masks hide."""
    captions = [caption for states, extra in conditioning for caption in _unpad(states, extra.get("attention_mask"))]
    if len(captions) == 1:
        captions *= count
    if len(captions) != count:
        raise ValueError(
            f"Latents and captions do not match: got {len(captions)} captions for {count} latents, expected one for "
            f"each. Connect the two outputs of one node."
        )
    return captions


def _unpad(states: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    rows = states.detach().cpu().clone()
    if mask is None:
        return list(rows)
    masks = mask.detach().cpu().bool().reshape(-1, rows.shape[1]).expand(len(rows), -1)
    return [row[kept] for row, kept in zip(rows, masks, strict=True)]


def _example(latent: torch.Tensor, caption: torch.Tensor) -> Example:
    height, width = (side * LATENT_DOWNSCALE for side in latent.shape[-2:])
    return Example(latent, caption, (height, width), nearest_ratio(height, width, _RATIO_TABLE_PX))


def load_features(path: str) -> FeatureSet:
    """The encoded dataset at a typed path, below the output folder or absolute."""
    return open_features(_find_features(path))


def _find_features(path: str) -> Path:
    """Where an encoded dataset lies: of several users each finds his own first."""
    output = folder_paths.get_output_directory()
    own = Path(output, own_output(path))
    is_own = is_inner(path) and own.exists()
    return find_typed(own_output(path) if is_own else path, output, "Encoded dataset").path


_VARYING = {"group": "variants", "mask": "masks", "repeats": "repeats", "weight": "weights"}


def describe_features(features: FeatureSet) -> str:
    """What an encoded dataset holds, in lines of text."""
    found = Bins.of(features.bins).counts().items()
    counts = {(width * LATENT_DOWNSCALE, height * LATENT_DOWNSCALE): count for (height, width), count in found}
    first = features[0]
    return "\n".join(
        [
            f"{len(features)} encoded pictures, captions of width {first.caption.shape[-1]}"
            + (", with control pictures" if first.hint is not None else "")
            + "".join(f", with {_VARYING[name]}" for name in getattr(features, "varying", ())),
            *(f"{width} x {height}: {count}" for (width, height), count in sorted(counts.items())),
            *getattr(features, "notes", ()),
        ]
    )
