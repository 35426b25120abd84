"""Crops of scenes for the autoencoder, drawn for every step: the same for the same step."""

import math
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .outlines import FILLINGS, NAMES
from .scenes import MOST_ITEMS, draw_scene, item_box, paint_icon, random_scene

CROP_PX = 48
FREE_SHARE = 0.15  # pictures with any colours and places, so that the autoencoder knows more than the captions' words
SIZES_PX = ((128, 128), (96, 160), (160, 96), (112, 144))


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """List of (h, w, 3) uint8 to (B, 3, h, w) float in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def _crop(picture: np.ndarray, x: float, y: float) -> np.ndarray:
    """The crop about (x, y), at any pixel: icons lie anywhere against the grid of 8x8 cells."""
    height, width = picture.shape[:2]
    left = round(min(max(x - CROP_PX / 2, 0), width - CROP_PX))
    top = round(min(max(y - CROP_PX / 2, 0), height - CROP_PX))
    return picture[top : top + CROP_PX, left : left + CROP_PX]


def _scene_crop(rng: Random) -> np.ndarray:
    """A crop about a point near some icon's rim, as the flat rest teaches little."""
    size_px = rng.choice(SIZES_PX)
    scene = random_scene(rng, rng.randint(1, MOST_ITEMS), *size_px)
    left, top, side = item_box(rng.choice(scene.items), *size_px)
    angle, reach = rng.uniform(0, 2 * math.pi), rng.uniform(0, side / 2)
    centre = left + side / 2 + reach * math.cos(angle), top + side / 2 + reach * math.sin(angle)
    return _crop(draw_scene(scene, *size_px), *centre)


def _free_crop(rng: Random) -> np.ndarray:
    """A crop of icons of any colour, which may overlap, over a gradient in any direction."""

    def colour() -> np.ndarray:
        return np.array([rng.uniform(0, 255) for _ in range(3)], np.float32)

    corners = [colour() for _ in range(3)]
    down, across = np.mgrid[0:1:96j, 0:1:96j].astype(np.float32)[..., None] * rng.choice((0, 1))
    picture = corners[0] + down * (corners[1] - corners[0]) / 2 + across * (corners[2] - corners[0]) / 2
    for _ in range(rng.randint(1, 4)):
        side = rng.uniform(24, 64)
        box = (rng.uniform(-5, 90 - side), rng.uniform(-5, 90 - side), side)
        palette = np.stack([colour() for _ in range(3)])
        paint_icon(picture, rng.choice(NAMES), box, palette, rng.choice(FILLINGS))
    return _crop(picture.clip(0, 255).astype(np.uint8), rng.uniform(20, 76), rng.uniform(20, 76))


class Crops(Dataset):
    """Batches by the step's number: (B, 3, CROP_PX, CROP_PX) float in [0, 1]."""

    def __init__(self, seed: int, batch_size: int):
        self.seed, self.batch_size = seed, batch_size

    def __getitem__(self, step: int) -> Tensor:
        rng = Random(f"crops {self.seed} {step}")
        draws = [_free_crop if rng.random() < FREE_SHARE else _scene_crop for _ in range(self.batch_size)]
        return to_tensor([draw(rng) for draw in draws])
