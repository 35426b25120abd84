"""Masks: what of a picture is to be learned, from its own alpha channel or from a picture beside it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...config import LATENT_DOWNSCALE
from ..pictures import Picture, alpha_of, decode_picture, read_picture
from .views import View

NONE, ALPHA, FILES = "none", "alpha", "files"
MASKS = (NONE, ALPHA, FILES)
LABEL = "-masklabel"  # behind the name of a picture: its mask, as OneTrainer writes it


@dataclass(frozen=True)
class AlphaPicture:
    """The alpha channel of a picture, as a grey one; white for a picture without."""

    picture: Picture

    def content(self) -> bytes:
        return self.picture.content()

    def open(self, content: bytes) -> Any:
        return alpha_of(decode_picture(self.picture, content))


def is_label(path: Path) -> bool:
    """Whether a picture is the mask of another one beside it."""
    return path.stem.endswith(LABEL)


def label_of(path: Path, suffixes: Iterable[str]) -> Path | None:
    """The mask beside a picture, with any suffix of pictures."""
    names = (path.with_name(f"{path.stem}{LABEL}{suffix}") for suffix in suffixes)
    return next((name for name in names if name.is_file()), None)


def read_mask(mask: Picture, view: View, bin_px: tuple[int, int], method: str, expected: str | None) -> torch.Tensor:
    """(1, h, w) float32 from 0 to 1 of a bin's latent, each number the mean of what lies under it."""
    pixels = read_picture(mask, bin_px, expected).mean(-1, keepdim=True)
    shown = view.shape.show(pixels, *bin_px, method).movedim(-1, 0)
    return F.avg_pool2d(shown[None], LATENT_DOWNSCALE)[0].clamp(0, 1)


def middle_of(mask: Picture) -> tuple[float, float] | None:
    """(x, y) of the middle of a mask, as shares of width and height; None where it is empty."""
    pixels = read_picture(mask).mean(-1)
    total = float(pixels.sum())
    if total <= 0:
        return None
    height, width = pixels.shape
    down, across = pixels.sum(1), pixels.sum(0)
    places = (
        float((line * (torch.arange(count) + 0.5)).sum()) / total / count
        for line, count in ((across, width), (down, height))
    )
    x, y = places
    return x, y
