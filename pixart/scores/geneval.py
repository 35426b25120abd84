"""GenEval: whether pictures show the objects, numbers, colours and places that their prompts' metadata name.

Source: Ghosh et al., "GenEval", arXiv:2310.11513, and its script. The detector is any of `finding`; Mask2Former is
GenEval's own, and the colours are judged on its masks; with a detector without masks on the boxes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files.documents import parse_json
from ..quoting import plain, shorten
from .finding import Detector, Found

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
PLACES = ("left of", "right of", "above", "below")
BLANK = (0x99, 0x99, 0x99)  # around a mask
LEAST_SCORE, LEAST_SCORE_COUNTING = 0.3, 0.9
MOST_OBJECTS = 16  # of a class
APART = 0.1  # of the two sizes, by which things must lie apart at least
OVERALL = "GenEval"
# (crops, texts by colour) -> the index of the nearest colour for each crop
ColourNamer = Callable[[Sequence[Image.Image], Sequence[Sequence[str]]], list[int]]


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """The rows of an `evaluation_metadata.jsonl`, checked. Raises ValueError naming the row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(_checked(parse_json(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Not GenEval's metadata: got line {number} of {plain(shorten(path.name))} "
                f"({plain(shorten(error, 200))}), expected such as "
                f'{{"tag": "counting", "prompt": "two dogs", "include": [{{"class": "dog", "count": 2}}]}}. '
                f"Correct the line."
            ) from error
    if not rows:
        raise ValueError(
            f"No prompts: got an empty {plain(shorten(path.name))}, expected GenEval's metadata. Choose another."
        )
    return rows


def _checked(row: dict) -> dict:
    """Raises ValueError, KeyError or TypeError for a row that `judge` cannot read."""
    if not (isinstance(row["prompt"], str) and row["prompt"].strip() and isinstance(row["tag"], str)):
        raise ValueError("no prompt or tag")
    for each in (*row.get("include", ()), *row.get("exclude", ())):
        if not isinstance(each["class"], str) or int(each["count"]) < 1:
            raise ValueError("no class or count")
    for index, each in enumerate(row.get("include", ())):
        if each.get("color", COLOURS[0]) not in COLOURS:
            raise ValueError(f"another colour than {', '.join(COLOURS)}")
        place, target = each.get("position", (PLACES[0], -1))
        if place not in PLACES or not target < index:
            raise ValueError("another position than that of an earlier thing")
    return row


class GenEval:
    """Scores pictures by metadata. colours: names the colour of crops; None where no row asks for one."""

    def __init__(self, rows: Sequence[Mapping], detector: Detector, colours: ColourNamer | None):
        self.rows = {row["prompt"].strip(): row for row in rows}
        self.detector, self.colours = detector, colours

    def __call__(self, picture: Image.Image, prompt: str) -> dict[str, float]:
        """{the row's tag: 1 where all is right, else 0}."""
        row = self.rows[prompt]
        names = list(dict.fromkeys(each["class"] for each in (*row.get("include", ()), *row.get("exclude", ()))))
        # The higher limit is for a detector of fixed classes; those of open ones are never as sure.
        is_strict = row["tag"] == "counting" and self.detector.has_masks
        found: dict[str, list[Found]] = {name: [] for name in names}
        for thing in self.detector.find(picture, names, LEAST_SCORE_COUNTING if is_strict else LEAST_SCORE):
            found[thing.name] = [*found[thing.name], thing][:MOST_OBJECTS]
        return {row["tag"]: float(judge(row, found, partial(self._name_colours, picture)))}

    def _name_colours(self, picture: Image.Image, things: Sequence[Found], name: str) -> list[str]:
        texts = [[each.format(colour=colour, name=name) for each in TEMPLATES] for colour in COLOURS]
        return [COLOURS[index] for index in self.colours([cut(picture, thing) for thing in things], texts)]


def overall(results: Mapping[str, list[float]]) -> float:
    """The mean of the tags' means, as GenEval publishes it."""
    return float(np.mean([np.nanmean(values) for values in results.values()]))


def judge(
    row: Mapping, found: Mapping[str, list[Found]], name_colours: Callable[[list[Found], str], list[str]]
) -> bool:
    """Whether everything that a row includes is there, and nothing that it excludes. found: the surest first."""
    correct, groups = True, []
    for wanted in row.get("include", ()):
        name, count = wanted["class"], int(wanted["count"])
        things = found[name][:count]
        right = len(things) == count
        if right and "color" in wanted:
            right = name_colours(things, name).count(wanted["color"]) >= count
        if right and "position" in wanted:
            place, target = wanted["position"]
            others = groups[target]
            right = others is not None and all(
                place in places(one.box, other.box) for one in things for other in others
            )
        groups.append(things if right else None)
        correct = correct and right
    return correct and all(len(found[each["class"]]) < int(each["count"]) for each in row.get("exclude", ()))


def places(first: tuple, second: tuple) -> set[str]:
    """Where the first box lies of the second; a part of their sizes is left out, so that it can be nowhere."""
    one, other = (np.array(box, float).reshape(2, 2) for box in (first, second))
    offset = one.mean(0) - other.mean(0)
    apart = APART * (np.ptp(one, 0) + np.ptp(other, 0))
    beyond = np.maximum(np.abs(offset) - apart, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {place for place, is_so in holds.items() if is_so}


def cut(picture: Image.Image, thing: Found) -> Image.Image:
    """The thing alone: its box, grey around its mask."""
    if thing.mask is not None:
        picture = Image.composite(picture, Image.new("RGB", picture.size, BLANK), Image.fromarray(thing.mask))
    left, top, right, bottom = (round(each) for each in thing.box)
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
