"""Scores of pictures: FID and CLIP score by torchmetrics with local weights, and any function's own."""

import importlib
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.pictures import FilePicture, decode_picture
from ..drawing.sheets import labelled_sheet
from ..files.atomic import write_atomically
from ..files.inside import check_folder
from ..quoting import plain, shorten
from ..weights.folders import TEXT_ENCODER_STEMS, find_weights
from ..weights.pickles import check_pth
from ..weights.reading import read_tensors, require_file

PICTURE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".webp"})
INCEPTION_FEATURES = 2048
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
GET_INCEPTION = f"Download {INCEPTION_URL} to any folder, and name the file with --inception."
GET_CLIP = (
    "Download a model with 'hf download openai/clip-vit-large-patch14 --local-dir clip-vit-large-patch14', and name "
    "its folder with --clip."
)
CLIP_SIDE_PX = 512  # CLIP sees 224 or 336; larger pictures only take time
SHOWN_PICTURES, SHOWN_PX = 16, 256
# What torch, safetensors and transformers raise for files of another kind.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError)
Scorer = Callable[[Image.Image, str], Mapping[str, float]]


@dataclass(frozen=True)
class Scores:
    """What to measure. real: folder of real pictures; inception: FID's weights. clip: folder. scorer: load_scorer's."""

    real: Path | None = None
    inception: Path | None = None
    clip: Path | None = None
    scorer: Scorer | None = None
    device: str = "cpu"

    def check(self, count: int) -> None:
        """Raises before `count` pictures are made what would be raised after it.

        ImportError without torchmetrics, FileNotFoundError for what is not there, and ValueError for other weights or
        too few pictures.
        """
        if self.real and not self.inception:
            raise ValueError(
                f"No weights for FID: got --real alone, expected --inception with its file. {GET_INCEPTION}"
            )
        self._check_paths()
        if self.real:
            smaller = min(len(find_pictures(self.real)), count)
            if smaller < 2:
                raise ValueError(
                    "Too few pictures for FID: got 1, expected at least 2 of each side, and 10000 or more for a number "
                    "to publish. Add prompts or real pictures, or leave --real out."
                )
            _torchmetrics("torch_fidelity")
            load_fid(self.inception)
        if self.clip:
            _torchmetrics()
            load_clip(self.clip)

    def _check_paths(self) -> None:
        advice = {self.real: "Correct the path.", self.inception: GET_INCEPTION, self.clip: GET_CLIP}
        for path, how in advice.items():
            if path and not path.exists():
                raise FileNotFoundError(f"Not found: got {shorten(str(path), 300)}, expected a file or folder. {how}")


def _torchmetrics(also: str | None = None) -> None:
    for name in filter(None, ("torchmetrics", also)):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"{name.replace('_', '-')} is missing: got no such package, expected it for FID and CLIP score. "
                f"Install it with 'pip install torchmetrics torch-fidelity'."
            ) from error


def load_scorer(text: str | None) -> Scorer | None:
    """`module:function` -> the function; None for None. Raises ValueError when there is none of that name."""
    if text is None:
        return None
    module, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"No such scorer: got {shorten(text)} ({shorten(error, 200)}), expected module:function of an importable "
            f"module. Correct it."
        ) from error


def find_pictures(folder: Path) -> list[Path]:
    """All pictures below a folder. Raises FileNotFoundError when there are none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not found:
        raise FileNotFoundError(
            f"No pictures: got {shorten(str(folder), 300)} without any, expected real pictures. Correct the path."
        )
    return found


def measure(scores: Scores, pictures: Sequence[tuple[Path, str]]) -> dict[str, list[float] | float]:
    """{name: one number for each picture, or one for all} of pictures with their prompts."""
    results: dict[str, list[float] | float] = {}
    if scores.clip:
        results["CLIP score"] = clip_scores(load_clip(scores.clip), pictures, scores.device)
    if scores.scorer:
        rows = [scores.scorer(_open(path), prompt) for path, prompt in pictures]
        names = dict.fromkeys(name for row in rows for name in row)
        results |= {name: [float(row.get(name, float("nan"))) for row in rows] for name in names}
    if scores.real:
        made = [path for path, _ in pictures]
        results["FID"] = frechet_distance(
            load_fid(scores.inception).to(scores.device), find_pictures(scores.real), made
        )
    return results


def load_fid(weights: Path):
    """torchmetrics' FID with Inception's weights from a file. Raises ValueError for another file."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        require_file(weights)
        check_pth(weights)
        # Without antialiasing, as the Inception of the published numbers resizes.
        return FrechetInceptionDistance(
            INCEPTION_FEATURES, feature_extractor_weights_path=str(weights), antialias=False
        )
    except (*_LOAD_ERRORS, pickle.UnpicklingError) as error:
        raise ValueError(
            f"Not Inception's weights: got {shorten(weights.name)} ({plain(_first_line(error), 200)}), "
            f"expected {INCEPTION}. {GET_INCEPTION}"
        ) from error


def load_clip(folder: Path):
    """torchmetrics' CLIP score with the model of a folder. Raises ValueError for a folder of another kind."""
    from torchmetrics.multimodal.clip_score import CLIPScore
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    class PlainCLIP(CLIPModel):
        """From transformers 5 on, features come in an object; torchmetrics computes with tensors."""

        def get_image_features(self, *args, **kwargs):
            return _tensor_of(super().get_image_features(*args, **kwargs))

        def get_text_features(self, *args, **kwargs):
            return _tensor_of(super().get_text_features(*args, **kwargs))

    def local():
        check_folder(folder)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        files, _ = find_weights(folder, TEXT_ENCODER_STEMS)
        if all(file.suffix == ".safetensors" for file in files):
            source, options = folder, {"local_files_only": True, "use_safetensors": True}
        else:  # read here, so that transformers reads no pickles
            config = CLIPConfig.from_pretrained(folder, local_files_only=True)
            source, options = None, {"config": config, "state_dict": read_tensors(folder, TEXT_ENCODER_STEMS)[0]}
        model, found = PlainCLIP.from_pretrained(source, output_loading_info=True, **options)
        if found["missing_keys"]:
            raise ValueError(f"{len(found['missing_keys'])} weights too few")
        return model, processor

    try:
        return CLIPScore(model_name_or_path=local)
    except _LOAD_ERRORS as error:
        raise ValueError(
            f"Not a CLIP model: got {shorten(str(folder), 300)} ({plain(_first_line(error), 200)}), "
            f"expected a folder with CLIP's weights, tokenizer and preprocessor, as transformers saves them. {GET_CLIP}"
        ) from error


def _first_line(error: Exception) -> str:
    return shorten(Exception((str(error).splitlines() or [type(error).__name__])[0]), 200)


def _tensor_of(features) -> torch.Tensor:
    return features if isinstance(features, torch.Tensor) else features.pooler_output


@torch.no_grad()
def clip_scores(metric, pictures: Sequence[tuple[Path, str]], device: str = "cpu") -> list[float]:
    """100 times the cosine of each picture and its prompt, cut at 0; prompts as long as CLIP reads them."""
    metric = metric.to(device)
    scores = []
    for path, prompt in pictures:
        picture = _open(path)
        picture.thumbnail((CLIP_SIDE_PX, CLIP_SIDE_PX))
        metric.reset()
        metric.update(_pixels(picture).to(device), prompt)
        scores.append(float(metric.compute()))
    return scores


@torch.no_grad()
def frechet_distance(metric, real: Sequence[Path], made: Sequence[Path]) -> float:
    """FID of two sets of pictures of any sizes. metric: torchmetrics' FrechetInceptionDistance."""
    for paths, is_real in ((real, True), (made, False)):
        for path in paths:
            metric.update(_pixels(_open(path))[None].to(metric.device), real=is_real)
    return float(metric.compute())


def _open(path: Path) -> Image.Image:
    picture = FilePicture(path)
    return decode_picture(picture, picture.content()).convert("RGB")


def _pixels(picture: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)


def write_report(
    folder: Path, title: str, settings: dict, pictures: Sequence[tuple[Path, str]], results: Mapping
) -> Path:
    """Write scores.json, the first pictures as one sheet, and report.md, whose path is returned.

    results: of `measure`. Means leave out what a scorer did not tell.
    """
    means = {name: _mean(values) for name, values in results.items()}
    rows = [
        {"picture": path.name, "prompt": prompt}
        | {name: values[index] for name, values in results.items() if isinstance(values, list)}
        for index, (path, prompt) in enumerate(pictures)
    ]
    scores = json.dumps({"means": means, "pictures": rows}, indent=1, ensure_ascii=False)
    write_atomically(folder / "scores.json", lambda file: file.write_text(scores, encoding="utf-8"))
    shown = pictures[:SHOWN_PICTURES]
    cells = [_open(path) for path, _ in shown]
    for cell in cells:
        cell.thumbnail((SHOWN_PX, SHOWN_PX))
    sheet = labelled_sheet(cells, [prompt for _, prompt in shown])
    write_atomically(folder / "pictures.png", lambda file: sheet.save(file, "PNG"))
    lines = [
        f"# {title}",
        "",
        f"{len(pictures)} pictures of {len({prompt for _, prompt in pictures})} prompts.",
        "",
        *(["| score | value |", "| --- | --- |"] if means else []),
        *(f"| {name} | {value:.4f} |" for name, value in means.items()),
        *([""] if means else []),
        "![The first pictures](pictures.png)",
        "",
        "```json",
        json.dumps(settings, indent=1, sort_keys=True),
        "```",
        "",
    ]
    report = folder / "report.md"
    write_atomically(report, lambda file: file.write_text("\n".join(lines), encoding="utf-8"))
    return report


def _mean(values: Sequence[float] | float) -> float:
    told = [value for value in np.atleast_1d(values) if not np.isnan(value)]
    return float(np.mean(told)) if told else float("nan")
