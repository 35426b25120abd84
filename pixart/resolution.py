"""Picture sizes: the aspect-ratio bins that PixArt was trained at, prompt flags, and fitting pictures into a bin."""

import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .quoting import plain, shorten

_FLAG_DIGITS = 6
FIT_METHODS = ("bicubic", "lanczos", "bilinear")

_BINS_1024 = {
    0.25: (512, 2048),
    0.26: (512, 1984),
    0.27: (512, 1920),
    0.28: (512, 1856),
    0.32: (576, 1792),
    0.33: (576, 1728),
    0.35: (576, 1664),
    0.4: (640, 1600),
    0.42: (640, 1536),
    0.48: (704, 1472),
    0.5: (704, 1408),
    0.52: (704, 1344),
    0.57: (768, 1344),
    0.6: (768, 1280),
    0.68: (832, 1216),
    0.72: (832, 1152),
    0.78: (896, 1152),
    0.82: (896, 1088),
    0.88: (960, 1088),
    0.94: (960, 1024),
    1.0: (1024, 1024),
    1.07: (1024, 960),
    1.13: (1088, 960),
    1.21: (1088, 896),
    1.29: (1152, 896),
    1.38: (1152, 832),
    1.46: (1216, 832),
    1.67: (1280, 768),
    1.75: (1344, 768),
    2.0: (1408, 704),
    2.09: (1472, 704),
    2.4: (1536, 640),
    2.5: (1600, 640),
    2.89: (1664, 576),
    3.0: (1728, 576),
    3.11: (1792, 576),
    3.62: (1856, 512),
    3.75: (1920, 512),
    3.88: (1984, 512),
    4.0: (2048, 512),
}
_TRAINING_ONLY = (0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88)


def _scale(base_px: int) -> dict[float, tuple[int, int]]:
    return {ratio: (h * base_px // 1024, w * base_px // 1024) for ratio, (h, w) in _BINS_1024.items()}


# {trained size: {nominal height / width: (height_px, width_px)}}: the tables that PixArt was trained with.
# Source: PixArt-alpha and PixArt-Sigma, diffusion/data/datasets/utils.py.
ASPECT_RATIOS = {base_px: _scale(base_px) for base_px in (256, 512, 1024, 2048)}

# The bins that PixArt-alpha's scripts and diffusers choose from. PixArt-Sigma at 2048 uses all of them.
INFERENCE_ASPECT_RATIOS = {
    base_px: {ratio: size for ratio, size in bins.items() if base_px == 2048 or ratio not in _TRAINING_ONLY}
    for base_px, bins in ASPECT_RATIOS.items()
}


@dataclass(frozen=True)
class PromptFlags:
    """What parse_prompt_flags found. Sizes are (height_px, width_px); output_px is what the picture is cut to."""

    prompt: str
    ratio: float
    bin_px: tuple[int, int]
    output_px: tuple[int, int]


def _bins(base_px: int, inference_only: bool) -> dict[float, tuple[int, int]]:
    tables = INFERENCE_ASPECT_RATIOS if inference_only else ASPECT_RATIOS
    if base_px not in tables:
        raise ValueError(
            f"Unknown resolution table: got {shorten(base_px)}, expected one of {', '.join(map(str, tables))}. "
            f"Choose the size that the model was trained at."
        )
    return tables[base_px]


def nearest_ratio(height_px: float, width_px: float, base_px: int, *, inference_only: bool = False) -> float:
    """The table's ratio nearest to height / width; the smaller one of two equally near.

    inference_only: choose from INFERENCE_ASPECT_RATIOS. Raises ValueError for sizes below 1 and unknown tables.
    """
    if height_px <= 0 or width_px <= 0:
        raise ValueError(
            f"Picture size out of range: got {width_px}x{height_px}, expected a width and height of at least 1. "
            f"Enter the wanted size, or choose a ratio."
        )
    return min(_bins(base_px, inference_only), key=lambda ratio: abs(ratio - height_px / width_px))


def nearest_bin(height_px: float, width_px: float, base_px: int, *, inference_only: bool = False) -> tuple[int, int]:
    """(height_px, width_px) of the bin whose ratio is nearest to height / width. See nearest_ratio."""
    ratio = nearest_ratio(height_px, width_px, base_px, inference_only=inference_only)
    return ASPECT_RATIOS[base_px][ratio]


def _find_flag(prompt: str, *names: str) -> tuple[int, int] | None:
    for name in names:
        match = re.search(rf"--{name}\s+(\d+):(\d+)", prompt)
        if match and max(map(len, match.groups())) > _FLAG_DIGITS:
            raise ValueError(
                f"Prompt flag out of range: got --{name} {plain(':'.join(match.groups()))}, expected two "
                f"numbers of at most {_FLAG_DIGITS} digits, such as --{name} 3:4. Correct the prompt."
            )
        if match:
            return int(match[1]), int(match[2])
    return None


def parse_prompt_flags(prompt: str, base_px: int, *, inference_only: bool = False) -> PromptFlags:
    """Read `--ar h:w` (or `--aspect_ratio h:w`, which wins) and `--hw H:W` (pixels) in a prompt.

    The caption is the text before the first flag. Without a ratio the bin is square; --hw does not choose a bin.
    Raises ValueError for a side of 0.
    Source: PixArt-alpha, diffusion/utils/misc.py, prepare_prompt_ar.
    """
    ratio = nearest_ratio(*_find_flag(prompt, "aspect_ratio", "ar") or (1, 1), base_px, inference_only=inference_only)
    output_px = _find_flag(prompt, "hw")
    if output_px and 0 in output_px:
        raise ValueError(f"Picture size out of range: got --hw {output_px[0]}:{output_px[1]}, expected at least 1:1.")
    bin_px = ASPECT_RATIOS[base_px][ratio]
    text = re.split("--aspect_ratio|--ar|--hw", prompt, maxsplit=1)[0]
    return PromptFlags(text, ratio, bin_px, output_px or bin_px)


def _cover_size(images: torch.Tensor, height_px: int, width_px: int) -> tuple[int, int]:
    """(h, w) with the ratio of images (..., H, W) that just covers the size; the longer side is rounded down."""
    h, w = images.shape[-2:]
    ratio = max(height_px / h, width_px / w)
    # max(): int() of a product such as 0.9999999 * 100 would fall one pixel short.
    return max(int(h * ratio), height_px), max(int(w * ratio), width_px)


def resize_to_cover(images: torch.Tensor, height_px: int, width_px: int, *, mode: str, antialias: bool) -> torch.Tensor:
    """Resize with the ratio kept so that the smaller side just covers the size. images: (B, C, H, W) -> (B, C, h, w).

    mode: of torch's interpolate. h >= height_px and w >= width_px; all PixArt code rounds the longer side down.
    """
    size = _cover_size(images, height_px, width_px)
    return F.interpolate(images, size=size, mode=mode, align_corners=False, antialias=antialias)


def crop_centre(images: torch.Tensor, height_px: int, width_px: int, *, round_half: bool = False) -> torch.Tensor:
    """Cut the middle out of images (..., H, W) -> (..., height_px, width_px).

    An odd rest goes to the bottom and right; with round_half half a pixel is rounded to even, as torchvision does.
    """
    top, left = images.shape[-2] - height_px, images.shape[-1] - width_px
    top, left = (round(top / 2), round(left / 2)) if round_half else (top // 2, left // 2)
    return images[..., top : top + height_px, left : left + width_px]


def resize_and_crop(
    images: torch.Tensor, height_px: int, width_px: int, *, repository_rule: bool = False
) -> torch.Tensor:
    """Bring finished pictures from their bin to the wanted size. images: (B, C, H, W) -> (B, C, height_px, width_px).

    diffusers' way: bilinear without antialias, then the middle. With repository_rule as PixArt-alpha's scripts do:
    with antialias, and not at all when height or width fits already (the result then has the size of the input).
    Source: diffusers, PixArtImageProcessor; PixArt-alpha, diffusion/data/datasets/utils.py, resize_and_crop_tensor.
    """
    h, w = images.shape[-2:]
    fits = (h == height_px or w == width_px) if repository_rule else (h, w) == (height_px, width_px)
    if fits:
        return images
    images = resize_to_cover(images, height_px, width_px, mode="bilinear", antialias=repository_rule)
    return crop_centre(images, height_px, width_px, round_half=repository_rule)


def crop_around(images: torch.Tensor, height_px: int, width_px: int, focus: tuple[float, float]) -> torch.Tensor:
    """Cut images (..., H, W) to (..., height_px, width_px) as near around a place as their edges allow.

    focus: (x, y) as shares of width and height.
    """
    sides = zip(images.shape[-2:], (height_px, width_px), focus[::-1], strict=True)
    top, left = (min(max(round(share * side - kept / 2), 0), side - kept) for side, kept, share in sides)
    return images[..., top : top + height_px, left : left + width_px]


def fit_images(
    images: torch.Tensor, height_px: int, width_px: int, method: str, focus: tuple[float, float] | None = None
) -> torch.Tensor:
    """Resize and crop pictures (B, C, H, W) with values in [0, 1] to (B, C, height_px, width_px).

    method: "bicubic" or "lanczos" with antialias, as the training pictures were prepared (lanczos from 2048 px on),
    or "bilinear" without, as diffusers finishes its pictures. focus: where to crop, see crop_around, but
    for "bilinear"; None is the middle. Raises ValueError for another method.
    """
    if method == "bilinear":
        # Two weights that add up to one but for their rounding can make more than 1 of ones.
        return resize_and_crop(images, height_px, width_px).clamp(0, 1)
    if method not in FIT_METHODS:
        raise ValueError(
            f"Unknown method: got {shorten(method)}, expected one of {', '.join(FIT_METHODS)}. Choose one of them."
        )
    if method == "lanczos":
        covered = _resize_lanczos(images, *_cover_size(images, height_px, width_px))
    else:
        covered = resize_to_cover(images, height_px, width_px, mode="bicubic", antialias=True)
    if focus is not None:
        return crop_around(covered, height_px, width_px, focus).clamp(0, 1)
    return crop_centre(covered, height_px, width_px, round_half=True).clamp(0, 1)


def _resize_lanczos(images: torch.Tensor, height_px: int, width_px: int) -> torch.Tensor:
    from PIL import Image

    planes = images.detach().flatten(0, 1).float().cpu().numpy()
    resized = [Image.fromarray(plane).resize((width_px, height_px), Image.Resampling.LANCZOS) for plane in planes]
    stacked = torch.from_numpy(np.stack([np.asarray(plane) for plane in resized]))
    return stacked.unflatten(0, images.shape[:2]).to(images)
