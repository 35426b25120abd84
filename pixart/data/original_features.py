"""Features in the files of PixArt-alpha's own training: one .npz a caption, one .npy a picture.

Source: PixArt-alpha, tools/extract_features.py and diffusion/data/datasets/InternalData.py, SA.py.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F

from ..config import ALPHA_CAPTION_LENGTH, LATENT_DOWNSCALE
from ..files.arrays import read_array, read_arrays, read_shape
from ..files.atomic import write_atomically
from ..files.documents import parse_json
from ..files.regular import TABLE_BYTES, open_regular, read_text
from ..quoting import shorten
from .buckets import Bins, training_bins
from .examples import Example, FeatureSet, check_plain
from .identity import digest
from .storage.originals import ListedEntries, OriginalEntry, open_entries, source_of, write_entries

CAPTION_FOLDERS = ("caption_feature_wmask", "caption_features", "caption_features_new")
# By preference; {px} is the trained size. "fatures" is the original's own spelling.
LATENT_FOLDERS = (
    "img_vae_fatures_{px}_multiscale/ms",
    "img_vae_features_{px}_multiscale/ms",
    "img_sdxl_vae_features_{px}resolution_ms_new",
    "img_vae_features_{px}resolution/noflip",
    "img_vae_feature/train_vae_{px}/noflip",
)
_END_BYTES = 1024
LIST, LISTED_FROM = "pixart_features", 1000  # the list that spares later starts, of sets of so many pictures
_LISTS = ("partition_filter/data_info.json", "partition/data_info.json", "data_info.json")


class OriginalFeatures:
    """A FeatureSet over such files. null_caption: T5 states (L, D) of the empty caption, which the layout has not."""

    def __init__(self, entries: Sequence[OriginalEntry], null_caption: torch.Tensor | None = None):
        self.entries, self.null_caption = entries, null_caption
        is_listed = isinstance(entries, ListedEntries)
        self.bins = entries.bins if is_listed else [_latent_size(entry.latent) for entry in entries]
        self.is_prior = np.zeros(len(self.bins), bool)

    @property
    def identity(self) -> str:
        """Of some of the files' bytes, among them the checksums that an .npz has at its end, and of the list."""
        if isinstance(self.entries, ListedEntries):
            return self.entries.identity
        parts = (part for entry in self.entries for part in (_some_of(entry.caption), _some_of(entry.latent)))
        sizes = (f"{tuple(entry.size_px)} {entry.aspect_ratio}" for entry in self.entries)
        return digest(*parts, *sizes)

    def name_of(self, index: int) -> str:
        return self.entries[index].latent.name

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        entry = self.entries[index]
        with _reading(entry.latent):
            moments = torch.from_numpy(_floats(read_array(entry.latent))).float()
        mean, deviation = moments.chunk(2) if len(moments) == 8 else (moments, None)
        return Example(
            latent=mean,
            deviation=deviation,
            caption=_read_caption(entry.caption),
            size_px=entry.size_px,
            aspect_ratio=entry.aspect_ratio,
            text=entry.text,
        )


def _some_of(path: Path) -> bytes:
    with _reading(path), open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        parts = [f"{size} ".encode()]
        for start in [*range(0, size, max(size // 16, _END_BYTES // 16)), max(size - _END_BYTES, 0)]:
            file.seek(start)
            parts.append(file.read(_END_BYTES if start + _END_BYTES >= size else _END_BYTES // 16))
        return b"".join(parts)


def _read_caption(path: Path) -> torch.Tensor:
    """(L, D), the rows that the mask keeps; all of them without a mask."""
    with _reading(path):
        found = read_arrays(path, "caption_feature", "attention_mask")
        states = torch.from_numpy(_floats(found["caption_feature"])).flatten(0, -2)
        mask = torch.from_numpy(found["attention_mask"]).reshape(-1) if "attention_mask" in found else None
    kept, length = len(states) if mask is None else int(mask.ne(0).sum()), len(states if mask is None else mask)
    if not kept or length != len(states):
        raise ValueError(
            f"Wrong caption: got states of the shape {tuple(states.shape)} and a mask that keeps {kept} of {length} in "
            f"{shorten(path.name)}, expected a mask for each that keeps some. Extract the features of it again."
        )
    return states[:kept]


def _floats(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "f":
        raise ValueError(f"numbers of the type {array.dtype}, which are no floating-point numbers")
    return array


def _latent_size(path: Path) -> tuple[int, int]:
    """(h, w) of a picture's latent, of which only the header is read."""
    with _reading(path):
        shape = read_shape(path)
    if len(shape) != 3 or shape[0] not in (4, 8):
        raise ValueError(
            f"Wrong latent: got the shape {shape} in {path.name}, expected (8, h, w), or (4, h, w) without deviation. "
            f"Extract the features with the VAE of PixArt."
        )
    return shape[1:]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises ValueError naming the file when numpy cannot read it."""
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, TypeError, BadZipFile) as error:
        raise ValueError(
            f"Feature file cannot be read: got {shorten(error, 200)} in {path.name}, expected an array that numpy "
            f"wrote. Extract the features of this picture again, or remove {shorten(str(path), 300)}."
        ) from error


def is_original(root: Path) -> bool:
    """True for a folder with captions in the original's files."""
    return any((root / name).is_dir() for name in CAPTION_FOLDERS)


def find_original_features(root: str | Path, base_px: int | None = None) -> OriginalFeatures:
    """The features below the root of a dataset of the original, by its data_info.json or, without one, by their names.

    base_px: the trained size, which names the folder of latents; None takes the only one there is.
    Pictures of which a file is missing are left out. Raises FileNotFoundError when there are none, ValueError when
    there are latents of several sizes to choose from.
    """
    root = Path(root)
    captions = next((root / name for name in CAPTION_FOLDERS if (root / name).is_dir()), None)
    if captions is None:
        raise FileNotFoundError(
            f"Features not found: got {shorten(str(root), 300)} without {' or '.join(CAPTION_FOLDERS)}, expected one "
            f"of them. Choose the root of the dataset."
        )
    latents, found_px = _find_latents(root, base_px)
    listed = next((root / name for name in _LISTS if (root / name).is_file()), None)
    path, folders = root / f"{LIST}_{found_px}.json", (captions, latents)
    source = source_of(folders, listed)
    if (known := open_entries(path, folders, source)) is not None:
        return OriginalFeatures(known)
    rows = _read_list(listed) if listed else _rows_by_name(latents)
    several = "multiscale" in latents.as_posix() or latents.name.endswith("_ms_new")
    entries = [entry for row in rows if (entry := _make_entry(row, captions, latents, found_px, several))]
    if not entries:
        raise FileNotFoundError(
            f"Features not found: got none of {len(rows)} listed pictures in {shorten(str(captions), 300)} and "
            f"{shorten(str(latents), 300)}, expected an .npz and an .npy for each. Extract the features again."
        )
    features = OriginalFeatures(entries)
    if len(entries) >= LISTED_FROM:
        names = {folder: len(folder.parts) for folder in folders}

        def name_of(file: Path) -> str:
            folder = captions if file.suffix == ".npz" else latents
            return Path(*file.parts[names[folder] :]).as_posix()

        write_entries(path, entries, Bins.of(features.bins), features.identity, source, name_of)
    return features


def _find_latents(root: Path, base_px: int | None) -> tuple[Path, int]:
    found = []
    for pattern in LATENT_FOLDERS:
        shape = re.compile(re.escape(pattern).replace(re.escape("{px}"), r"(\d+)"))
        for folder in sorted(root.glob(pattern.replace("{px}", "*"))):
            match = shape.fullmatch(folder.relative_to(root).as_posix())
            if match and base_px in (None, int(match[1])):
                found.append((folder, int(match[1])))
    if not found:
        wanted = "one of any size" if base_px is None else f"one of {base_px} px"
        raise FileNotFoundError(
            f"Latents not found: got no folder such as {LATENT_FOLDERS[3].format(px=base_px or 512)} in "
            f"{shorten(str(root), 300)}, expected {wanted}. Extract the VAE features, or enter their resolution."
        )
    if base_px is None and len({px for _, px in found}) > 1:
        names = ", ".join(folder.relative_to(root).as_posix() for folder, _ in found)
        raise ValueError(f"Which latents are meant: got {names}, expected one size. Enter the resolution.")
    return found[0]


def _read_list(path: Path) -> list[dict]:
    try:
        rows = parse_json(read_text(path, TABLE_BYTES), TABLE_BYTES)
    except ValueError as error:
        raise _wrong_list(path, f"no JSON ({shorten(error, 200)})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "path" in row for row in rows):
        raise _wrong_list(path, "other JSON")
    return rows


def _wrong_list(path: Path, got: str) -> ValueError:
    return ValueError(
        f"Unreadable '{path.name}': got {got}, expected a list of objects with path. Correct '{path}' or extract the "
        f"features again."
    )


def _rows_by_name(latents: Path) -> list[dict]:
    return [{"path": f"{path.stem}.png", "prompt": ""} for path in sorted(latents.glob("*.npy"))]


def _make_entry(row: dict, captions: Path, latents: Path, base_px: int, several: bool) -> OriginalEntry | None:
    path = PurePosixPath(os.path.splitext(str(row["path"]).replace("\\", "/"))[0])
    joined = path.parent.with_name(f"{path.parent.name}_{path.name}") if path.parent.name else path
    names = [name for name in (joined, PurePosixPath(path.name)) if ".." not in name.parts and not name.is_absolute()]
    caption = next(filter(os.path.isfile, (captions / f"{name}.npz" for name in names)), None)
    latent = next(filter(os.path.isfile, (latents / f"{name}.npy" for name in names)), None)
    if caption is None or latent is None:
        return None
    size_px, ratio = (base_px, base_px), 1.0
    if several:
        height, width = (side * LATENT_DOWNSCALE for side in _latent_size(latent))
        size_px = int(row.get("height") or height), int(row.get("width") or width)
        ratio = min(training_bins(base_px), key=lambda nominal: abs(nominal - height / width))
    return OriginalEntry(caption, latent, size_px, ratio, str(row.get("prompt") or ""))


def write_original_features(
    features: FeatureSet,
    root: str | Path,
    base_px: int,
    square: bool = False,
    caption_length: int = ALPHA_CAPTION_LENGTH,
) -> None:
    """Write captions (1, caption_length, D) with masks, latents (8, h, w) = mean and deviation, and data_info.json.

    square: into the folder of the single-size training, else of the multi-size one. Pictures are named by number.
    Raises ValueError for a caption that is longer than caption_length.
    """
    check_plain(features, "Original layout")
    root = Path(root)
    captions = root / CAPTION_FOLDERS[0]
    latents = root / LATENT_FOLDERS[3 if square else 0].format(px=base_px)
    rows = []
    for index in range(len(features)):
        example, name = features[index], f"{index:06d}"
        moments = torch.cat([example.latent, _or_zeros(example.deviation, example.latent)]).float().numpy()
        arrays = _pad_caption(example.caption, caption_length, example.text)
        write_atomically(captions / f"{name}.npz", lambda file, arrays=arrays: _save(file, np.savez, **arrays))
        write_atomically(latents / f"{name}.npy", lambda file, moments=moments: _save(file, np.save, moments))
        height, width = example.size_px
        rows.append({"path": f"{name}.png", "prompt": example.text, "height": height, "width": width})
        rows[-1]["ratio"] = height / width
    text = json.dumps(rows, ensure_ascii=False, indent=1)
    write_atomically(root / _LISTS[1], lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _save(path: Path, write, *args, **arrays) -> None:
    with path.open("wb") as file:  # by name numpy would add a suffix
        write(file, *args, **arrays)


def _or_zeros(deviation: torch.Tensor | None, latent: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(latent) if deviation is None else deviation


def _pad_caption(caption: torch.Tensor, caption_length: int, text: str) -> dict[str, np.ndarray]:
    if len(caption) > caption_length:
        raise ValueError(
            f"Caption too long: got {len(caption)} tokens for {shorten(text[:60])}, expected at most {caption_length}. "
            f"Encode the dataset with a caption length of {caption_length}, or write longer ones."
        )
    rest = caption_length - len(caption)
    mask = F.pad(torch.ones(len(caption), dtype=torch.int64), (0, rest))
    padded = F.pad(caption.float(), (0, 0, 0, rest))
    return {"caption_feature": padded[None].numpy(), "attention_mask": mask[None].numpy()}
