"""Scores pictures by the captions that they were made of, for `python -m pixart evaluate --scorer`."""

import re
from collections.abc import Mapping

import numpy as np
from PIL import Image

from . import scorer
from .scenes import BACKGROUNDS, COLOURS, POSITIONS, SIZES, TRAINED_SHAPES, Item, Scene


def _one_of(words) -> str:
    return f"({'|'.join(sorted(words, key=len, reverse=True))})"  # longest first: `top left` is not `top`


_ITEM = re.compile(
    rf"a {_one_of(SIZES)} {_one_of(COLOURS)} {_one_of(TRAINED_SHAPES)} (?:in|on|at) the {_one_of(POSITIONS)}\b"
)
_BACKGROUND = re.compile(rf" on a {_one_of(BACKGROUNDS)} background$")


def read_caption(text: str) -> Scene:
    """The scene of a caption as `scenes.caption` writes it. Raises ValueError for other words."""
    background, items = _BACKGROUND.search(text), _ITEM.findall(text)
    if background is None or len(items) != text.count(" and ") + 1:
        raise ValueError(
            f"Caption is not understood: got '{text}', expected one such as 'a large red circle in the top left on a "
            f"white background'."
        )
    return Scene(background[1], tuple(Item(shape, colour, place, size) for size, colour, shape, place in items))


def score(picture: Image.Image, prompt: str) -> Mapping[str, float]:
    """The share of each attribute that the picture has right, 0 to 1."""
    counts = scorer.score(np.asarray(picture), read_caption(prompt))
    return {name: right / total for name, (right, total) in counts.items()}
