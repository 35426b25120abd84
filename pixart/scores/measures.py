"""Scores of pictures: FID and CLIP score by torchmetrics with local weights, and any function's own."""

import importlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.pictures import FilePicture, decode_picture
from ..quoting import plain, shorten
from ..weights.pickles import check_pth
from ..weights.reading import require_file
from .local import LOAD_ERRORS, first_line, load_model, load_processor, refusal

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
        rows = [scores.scorer(open_picture(path), prompt) for path, prompt in pictures]
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
    except (*LOAD_ERRORS, pickle.UnpicklingError) as error:
        raise ValueError(
            f"Not Inception's weights: got {shorten(weights.name)} ({plain(first_line(error), 200)}), "
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
        return load_model(folder, PlainCLIP, CLIPConfig), load_processor(folder, CLIPProcessor)

    try:
        return CLIPScore(model_name_or_path=local)
    except LOAD_ERRORS as error:
        raise refusal("a CLIP model", folder, error, GET_CLIP) from error


def _tensor_of(features) -> torch.Tensor:
    return features if isinstance(features, torch.Tensor) else features.pooler_output


@torch.no_grad()
def clip_scores(metric, pictures: Sequence[tuple[Path, str]], device: str = "cpu") -> list[float]:
    """100 times the cosine of each picture and its prompt, cut at 0; prompts as long as CLIP reads them."""
    metric = metric.to(device)
    scores = []
    for path, prompt in pictures:
        picture = open_picture(path)
        picture.thumbnail((CLIP_SIDE_PX, CLIP_SIDE_PX))
        metric.reset()
        metric.update(_pixels(picture).to(device), prompt)
        scores.append(float(metric.compute()))
    return scores


def clip_similarity(metric) -> Callable[[Image.Image, str], float]:
    """(picture, text) -> the cosine of what CLIP makes of them; texts as long as it reads them. metric: load_clip's."""

    def similarity(picture: Image.Image, text: str) -> float:
        return float((_of_pictures(metric, [picture]) @ _of_texts(metric, [text]).T)[0, 0])

    return similarity


def clip_chooser(metric) -> Callable[[Sequence[Image.Image], Sequence[Sequence[str]]], list[int]]:
    """(pictures, texts of each class) -> the class nearest to each picture. metric: load_clip's."""

    def choose(pictures: Sequence[Image.Image], classes: Sequence[Sequence[str]]) -> list[int]:
        means = torch.stack([_of_texts(metric, texts).mean(0) for texts in classes])
        means /= means.norm(dim=-1, keepdim=True)
        return (_of_pictures(metric, pictures) @ means.T).argmax(1).tolist() if pictures else []

    return choose


@torch.no_grad()
def _of_pictures(metric, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """(count, channels), of length 1."""
    inputs = metric.processor(images=list(pictures), return_tensors="pt").to(metric.device)
    features = metric.model.get_image_features(inputs["pixel_values"])
    return features / features.norm(dim=-1, keepdim=True)


@torch.no_grad()
def _of_texts(metric, texts: Sequence[str]) -> torch.Tensor:
    """(count, channels), of length 1."""
    inputs = metric.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True).to(metric.device)
    features = metric.model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    return features / features.norm(dim=-1, keepdim=True)


@torch.no_grad()
def frechet_distance(metric, real: Sequence[Path], made: Sequence[Path]) -> float:
    """FID of two sets of pictures of any sizes. metric: torchmetrics' FrechetInceptionDistance."""
    for paths, is_real in ((real, True), (made, False)):
        for path in paths:
            metric.update(_pixels(open_picture(path))[None].to(metric.device), real=is_real)
    return float(metric.compute())


def open_picture(path: Path) -> Image.Image:
    picture = FilePicture(path)
    return decode_picture(picture, picture.content()).convert("RGB")


def _pixels(picture: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)
