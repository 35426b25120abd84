"""Several views of one picture: cut around another place, nearer, mirrored, in other colours."""

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from random import Random

import numpy as np
import torch

from ...quoting import shorten
from ...resolution import fit_images

CENTRE, RANDOM, MASK = "centre", "random", "mask"
_PLACES = {CENTRE: (0.5, 0.5), "top": (0.5, 0.0), "bottom": (0.5, 1.0), "left": (0.0, 0.5), "right": (1.0, 0.5)}
FOCI = (*_PLACES, RANDOM, MASK)
MOST_VARIANTS = 100
_DIGITS = 3  # of what is drawn: as it is named in keys
_COLOUR, _HUE = 0.3, 0.05  # how far the greatest strength goes: a factor from 1, and a share of the circle
# RGB to brightness and two axes of colour, in which hues turn. Source: the YIQ of NTSC.
_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = torch.from_numpy(np.linalg.inv(_TO_YIQ.numpy()))


@dataclass(frozen=True)
class View:
    """What of a picture is shown, and how; the plain one is its middle.

    x, y: the place that lies as near to the middle as it can, as shares of width and height. zoom: how many times
    nearer. flipped: mirrored. brightness, contrast, saturation: factors. hue: a share of the circle.
    """

    x: float = 0.5
    y: float = 0.5
    zoom: float = 1.0
    flipped: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    @property
    def name(self) -> str:
        """What tells it from others; empty for the plain one."""
        return "" if self == PLAIN else " ".join(f"{value:g}" for value in astuple(self))

    @property
    def shape(self) -> "View":
        """The same without its colours, for masks and control pictures."""
        return View(self.x, self.y, self.zoom, self.flipped)

    def show(self, pixels: torch.Tensor, height_px: int, width_px: int, method: str) -> torch.Tensor:
        """(H, W, C) in [0, 1] -> (height_px, width_px, C). method: of resolution.FIT_METHODS."""
        pixels, x, y = self._nearer(pixels)
        focus = None if (x, y) == (0.5, 0.5) else (x, y)
        fitted = fit_images(pixels.movedim(-1, 0)[None], height_px, width_px, method, focus)[0].movedim(0, -1)
        fitted = fitted.flip(1) if self.flipped else fitted
        return fitted if self == self.shape else self._coloured(fitted)

    def _nearer(self, pixels: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        """(the part that is shown, the focus in it)."""
        if self.zoom <= 1:
            return pixels, self.x, self.y
        (top, height, y), (left, width, x) = (
            _window(side, self.zoom, share) for side, share in zip(pixels.shape[:2], (self.y, self.x), strict=True)
        )
        return pixels[top : top + height, left : left + width], x, y

    def _coloured(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels * self.brightness
        grey = (pixels @ _TO_YIQ[0])[..., None]
        pixels = grey + (pixels - grey) * self.saturation
        pixels = grey.mean() + (pixels - grey.mean()) * self.contrast
        if self.hue:
            sine, cosine = math.sin(2 * math.pi * self.hue), math.cos(2 * math.pi * self.hue)
            turn = torch.tensor([[1.0, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
            pixels = pixels @ (_FROM_YIQ @ turn @ _TO_YIQ).T
        return pixels.clamp(0, 1)


PLAIN = View()


def _window(side: int, zoom: float, share: float) -> tuple[int, int, float]:
    """(where a window begins, its length, where the share of the side lies in it) around a share of a side."""
    length = max(round(side / zoom), 1)
    start = min(max(round(share * side - length / 2), 0), side - length)
    return start, length, min(max((share * side - start) / length, 0.0), 1.0)


@dataclass(frozen=True)
class ViewVariety:
    """How pictures are varied before they are encoded. Each variant is encoded and stored; a training draws one a step.

    variants: how many there are of a picture, the first of them without zoom, mirror and colours. focus: where a
    picture is cut, of FOCI or as "x, y" from 0 to 1; random is another place in each; mask the middle of its mask.
    zoom: how many times nearer variants are at most. flip: share of them that is mirrored. colour: strength of other
    brightness, contrast, saturation and hue, from 0 to 1.
    Raises ValueError for numbers out of range.
    """

    variants: int = 1
    focus: str = CENTRE
    zoom: float = 1.0
    flip: float = 0.0
    colour: float = 0.0

    def __post_init__(self):
        ranges = {"variants": (1, MOST_VARIANTS), "zoom": (1, 10), "flip": (0, 1), "colour": (0, 1)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(
                    f"Out of range: got {shorten(value)} as {name} of pictures, expected a number from {low} to "
                    f"{high}. Correct it."
                )
        self._place(PLAIN.x, PLAIN.y)

    def of(self, content: str, middle: tuple[float, float] | None = None) -> Iterator[View]:
        """The views of a picture. content: its digest, by which they are drawn. middle: (x, y) of its mask, or None."""
        for number in range(self.variants):
            rng = Random(f"{content} {number}")
            x, y = (rng.random(), rng.random()) if self.focus == RANDOM else self._place(*(middle or (0.5, 0.5)))
            view = View(round(x, _DIGITS), round(y, _DIGITS))
            yield self._drawn(view, rng) if number else view

    def _drawn(self, view: View, rng: Random) -> View:
        zoom, is_flipped = 1 + rng.random() * (self.zoom - 1), rng.random() < self.flip
        factors = [1 + rng.uniform(-_COLOUR, _COLOUR) * self.colour for _ in range(3)]
        numbers = (round(value, _DIGITS) for value in (zoom, *factors, rng.uniform(-_HUE, _HUE) * self.colour))
        zoom, brightness, contrast, saturation, hue = numbers
        return replace(
            view,
            zoom=zoom,
            flipped=is_flipped,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
        )

    def _place(self, x: float, y: float) -> tuple[float, float]:
        """The focus; (x, y) is that of the mask."""
        if self.focus in FOCI:
            return (x, y) if self.focus in (RANDOM, MASK) else _PLACES[self.focus]
        try:
            found = tuple(float(word) for word in self.focus.replace(",", " ").split())
        except ValueError:
            found = ()
        if len(found) != 2 or not all(0 <= each <= 1 for each in found):
            raise ValueError(
                f"Unknown focus: got {shorten(self.focus)}, expected one of {', '.join(FOCI)}, or two numbers from 0 "
                f"to 1 such as '0.5, 0.3'. Correct it."
            )
        return found
