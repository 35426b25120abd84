"""A reference picture of any size, as the model sees it best."""

import math

import torch

from ..resolution import fit_images

_GRID_PX = 16
_LONGEST = 4.0  # of the sides' ratio, as in PixArt's own sizes


def reference_size(height_px: int, width_px: int, base_px: int) -> tuple[int, int]:
    """(height_px, width_px) of the area that a model was trained at, in the picture's own proportions up to 4 : 1."""
    ratio = min(max(height_px / width_px, 1 / _LONGEST), _LONGEST)
    sides = base_px * math.sqrt(ratio), base_px / math.sqrt(ratio)
    return tuple(max(round(side / _GRID_PX), 1) * _GRID_PX for side in sides)


def fit_reference(pixels: torch.Tensor, base_px: int) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [0, 1], resized and cropped from their middle to `reference_size`."""
    return fit_images(pixels, *reference_size(*pixels.shape[2:], base_px), "bicubic").clamp(0, 1)
