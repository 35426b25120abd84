"""Training pictures: where one is kept, what identifies it, and how it is decoded."""

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..files.inside import is_inside
from ..files.regular import MEGABYTE, open_regular, read_bytes
from ..quoting import shorten
from .identity import digest

PICTURE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# What cameras and the web give as well: read where PIL can do it, else named in the check and not passed over.
PICTURE_SUFFIXES |= {".heic", ".heif", ".jp2", ".jxl", ".tga"}
# EXIF's orientation -> PIL's transposition. PIL's own exif_transpose writes the EXIF again, which broken tags defeat.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# What PIL's decoders raise for broken files, each its own.
_BROKEN = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError)
_BROKEN += (TypeError, ValueError, struct.error)
# What the suffixes above stand for. PIL would open anything by its content, and run a program for PostScript.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "JXL", "MPO", "PNG", "PPM", "TIFF", "WEBP", "TGA")
MOST_PIXELS = 178_956_970  # where PIL's own limit is unless another program in the process has lifted it
PICTURE_BYTES = 1100 * MEGABYTE  # what that many pixels take in RGB of 16 bits without compression
_HUGE_PIXELS = 2**24  # from here on a picture is first halved in steps, so that it never stands in memory as floats
_REDUCIBLE = frozenset({"L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"})  # PIL's modes that its reduce can average
_SHRINK_GAP = 2  # and keeps at least this many times the wanted size, so that the fit decides how it looks


class Picture(Protocol):
    """A picture somewhere. content: what identifies it, as bytes. open: what those bytes show."""

    def content(self) -> bytes: ...

    def open(self, content: bytes) -> Any: ...


class _EncodedPicture:
    """A picture in a file format that PIL reads."""

    def open(self, content: bytes):
        from PIL import Image

        Image.init()
        opened = Image.open(io.BytesIO(content), formats=[name for name in _FORMATS if name in Image.OPEN])
        width, height = opened.size
        if width * height > MOST_PIXELS:
            raise ValueError(
                f"too large: {width} x {height} px, expected at most {MOST_PIXELS / 1e6:.0f} megapixels in all"
            )
        return opened


@dataclass(frozen=True)
class FilePicture(_EncodedPicture):
    """A picture file."""

    path: Path

    def content(self) -> bytes:
        return read_bytes(self.path, PICTURE_BYTES)


@dataclass(frozen=True)
class ArchivePicture(_EncodedPicture):
    """A picture file within a tar file: so many bytes from an offset on."""

    path: Path
    offset: int
    size: int

    def content(self) -> bytes:
        if self.size > PICTURE_BYTES:
            raise ValueError(f"{self.size} bytes, expected at most {PICTURE_BYTES}")
        with open_regular(self.path) as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class RowPicture(_EncodedPicture):
    """A picture in a Hugging Face dataset whose picture column is not decoded.

    folder: where the paths in its cells begin; with confined they may not leave it.
    """

    rows: Any
    index: int
    column: str
    folder: Path
    confined: bool = False

    def content(self) -> bytes:
        cell = self.rows[self.index][self.column] or {}
        if cell.get("bytes") is not None:
            return cell["bytes"]
        path = Path(os.path.normpath(self.folder / (cell.get("path") or "")))
        if self.confined and not is_inside(path, self.folder):
            raise ValueError("its path leads out of the dataset's folder")
        return read_bytes(path, PICTURE_BYTES)


@dataclass(frozen=True, eq=False)
class TensorPicture:
    """A picture in memory: (H, W, C) float in [0, 1], of 1, 3 or 4 channels."""

    pixels: torch.Tensor

    def content(self) -> bytes:
        pixels = self.pixels.detach().float().cpu().contiguous()
        return str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()

    def open(self, content: bytes) -> torch.Tensor:
        return self.pixels


def read_picture(picture: Picture, least_px: tuple[int, int] = (0, 0), expected: str | None = None) -> torch.Tensor:
    """Decode a picture to (H, W, 3) float32 RGB in [0, 1], upright; transparent parts are laid over white.

    least_px: (height, width) that the caller will fit it into. A picture of more than 16 megapixels is shrunk by a
    whole number while it stays twice as large. expected: the digest of its content when it was listed.
    Raises ValueError when the content has changed since or cannot be decoded, OSError when it cannot be read.
    """
    content = picture.content()
    if expected is not None and digest(content) != expected:
        raise ValueError(
            f"Picture has changed while it was encoded: got another content in {picture}, expected that of the check. "
            f"Run it again."
        )
    decoded = decode_picture(picture, content)
    if isinstance(decoded, torch.Tensor):
        return _to_rgb(decoded.detach().float().cpu())
    return _to_rgb(_to_tensor(_shrink(decoded, least_px)))


def decode_picture(picture: Picture, content: bytes):
    """What a content shows, decoded to its end: a PIL picture, upright, or a tensor. Raises ValueError in words."""
    from PIL import Image, UnidentifiedImageError

    try:
        opened = picture.open(content)
        if isinstance(opened, torch.Tensor):
            return opened
        opened.load()
        turn = _TURNS.get(_orientation(opened))
        return opened if turn is None else opened.transpose(Image.Transpose[turn])
    except UnidentifiedImageError as error:
        raise ValueError("no format that can be read here") from error
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise ValueError(shorten(error, 200) or type(error).__name__) from error


def measure_picture(picture: Picture, content: bytes) -> tuple[int, int]:
    """(height, width) of a picture as it is shown, read from its header alone but for TIFF."""
    opened = picture.open(content)
    if isinstance(opened, torch.Tensor):
        return tuple(opened.shape[:2])
    if opened.format == "TIFF":  # which some versions of PIL turn when they decode it, but not its EXIF
        upright = decode_picture(picture, content)
        return upright.height, upright.width
    turned = _orientation(opened) in (5, 6, 7, 8)
    return (opened.width, opened.height) if turned else (opened.height, opened.width)


def _orientation(image) -> int:
    return image.getexif().get(0x0112, 1)


def _shrink(image, least_px: tuple[int, int]):
    height_px, width_px = least_px
    if not (height_px and width_px) or image.width * image.height < _HUGE_PIXELS or image.mode not in _REDUCIBLE:
        return image
    factor = min(image.height // (height_px * _SHRINK_GAP), image.width // (width_px * _SHRINK_GAP))
    return image.reduce(factor) if factor > 1 else image


def _to_tensor(image) -> torch.Tensor:
    """(H, W, C) float32 in [0, 1] of a PIL picture, C being 1, 3 or 4."""
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image).astype(np.float32) / _peak_of(image)
        return torch.from_numpy(grey)[..., None].clamp(0, 1)
    pixels = np.asarray(image.convert("RGBA" if has_alpha(image) else "RGB"))
    return torch.from_numpy(pixels.astype(np.float32) / 255.0)


def _peak_of(image) -> float:
    """What white is in a grey picture of PIL's wide modes: 16-bit integers, or floats up to 1 or to 255."""
    if image.mode != "F":
        return 65535.0
    return 1.0 if image.getextrema()[1] <= 1.0 else 255.0


def has_alpha(decoded) -> bool:
    """Whether what decode_picture gave has an alpha channel."""
    if isinstance(decoded, torch.Tensor):
        return decoded.shape[-1] == 4
    return "A" in decoded.getbands() or "transparency" in decoded.info


def alpha_of(decoded) -> torch.Tensor:
    """(H, W, 1) float32, the alpha channel of what decode_picture gave; ones without any."""
    pixels = decoded.detach().float().cpu() if isinstance(decoded, torch.Tensor) else _to_tensor(decoded)
    return pixels[..., 3:] if pixels.shape[-1] == 4 else torch.ones_like(pixels[..., :1])


def _to_rgb(pixels: torch.Tensor) -> torch.Tensor:
    """(H, W, C) -> (H, W, 3), over white."""
    if pixels.shape[-1] == 1:
        return pixels.repeat(1, 1, 3)
    if pixels.shape[-1] == 4:
        alpha = pixels[..., 3:]
        return pixels[..., :3] * alpha + (1 - alpha)
    return pixels[..., :3]
