"""Edges without a trained network: canny lines, and soft edges in the manner of HED."""

import math

import torch
from torch.nn import functional as F

SCALES_PX = (1.0, 2.0, 4.0)  # deviations of the Gaussians; the largest is about as wide as HED's lines
FULL_STEP = 0.25  # a step of colour of this height, seen at all scales, is drawn with 63 % of white


def canny_edges(images: torch.Tensor, low_threshold: float = 0.4, high_threshold: float = 0.8) -> torch.Tensor:
    """White lines one pixel wide on black: (B, 3, H, W) in [0, 1] -> (B, 1, H, W) of 0 and 1.

    Thresholds are of the gradient of the blurred brightness; lines above the lower one stay where they touch one
    above the higher one. Raises ValueError unless 0 < low_threshold <= high_threshold < 1.
    """
    if not 0 < low_threshold <= high_threshold < 1:
        raise ValueError(
            f"Thresholds out of order: got {low_threshold} and {high_threshold}, expected 0 < low <= high < 1. "
            f"Set low_threshold below high_threshold."
        )
    from kornia.filters import canny

    return canny(images.float(), low_threshold, high_threshold)[1]


def soft_edges(images: torch.Tensor) -> torch.Tensor:
    """Soft lines on black, bright where colours change: (B, C, H, W) in [0, 1] -> (B, 1, H, W) in [0, 1].

    The steepest channel's gradient at three scales, each normalised so that a step gives its height, then averaged:
    changes of hue count as those of brightness do, and texture finer than the scales fades.
    """
    total = torch.zeros_like(images[:, :1], dtype=torch.float32)
    for scale in SCALES_PX:
        across, down = _gradient(images.float(), scale)
        slope = (across.square() + down.square()).amax(1, keepdim=True).sqrt()
        total += slope * (scale * math.sqrt(2 * math.pi) / len(SCALES_PX))
    return 1 - torch.exp(-total / FULL_STEP)


def _gradient(images: torch.Tensor, scale_px: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives of the pictures (B, C, H, W) under a Gaussian blur: across and down, the shape of the pictures."""
    reach = math.ceil(3 * scale_px)
    place = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    blur = torch.exp(-0.5 * (place / scale_px).square())
    blur = blur / blur.sum()
    slope = blur * place / scale_px**2  # its correlation with a ramp of one per pixel is one
    # One picture of as many channels as there are planes: convolved in groups, that is ten times as fast as a batch.
    planes = F.pad(images.flatten(0, 1)[None], (reach, reach, reach, reach), mode="replicate")
    count = planes.shape[1]

    def filtered(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        down = F.conv2d(planes, rows.view(1, 1, -1, 1).expand(count, -1, -1, -1), groups=count)
        return F.conv2d(down, columns.view(1, 1, 1, -1).expand(count, -1, -1, -1), groups=count).reshape(images.shape)

    return filtered(blur, slope), filtered(slope, blur)
