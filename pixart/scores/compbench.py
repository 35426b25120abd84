"""T2I-CompBench: whether pictures show the attributes, places, numbers and actions of their prompts.

Source: Huang et al., "T2I-CompBench", arXiv:2307.06350, and its scripts. Of them are other here: the noun phrases
(`phrases`, in place of spaCy), and the detector (in place of UniDet). 3D places need a depth map and are refused.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..quoting import plain, shorten
from .asking import Asker
from .finding import Detector, Found
from .phrases import Relation, bare_nouns, find_counts, find_relation, noun_phrases

# category: what measures it
MEASURES = {
    "color": ("attributes",),
    "shape": ("attributes",),
    "texture": ("attributes",),
    "spatial": ("places",),
    "non_spatial": ("actions",),
    "numeracy": ("numbers",),
    "complex": ("attributes", "places", "actions"),
}
NEEDS = {"attributes": "vqa", "places": "detector", "numbers": "detector", "actions": "clip"}
NAMES = {
    "attributes": "BLIP-VQA",
    "places": "2D spatial",
    "numbers": "numeracy",
    "actions": "CLIP similarity",
    "mean": "3-in-1",
}
MOST_PHRASES = 8
SIDE_PX = 512  # of the pictures that the distances below are for
NEAR_PX = 150
OVERLAP = 0.1
LEAST_SCORE = 0.3  # of a detection
# cosine of a picture and a text by CLIP, without scale
Similarity = Callable[[Image.Image, str], float]


class Tools(NamedTuple):
    """What measures; those that a category does not need can be None."""

    vqa: Asker | None = None
    detector: Detector | None = None
    clip: Similarity | None = None


def category_of(name: str) -> str | None:
    """The category in the name of an official prompt file, such as `color_val.txt`; None for other names."""
    found = re.match(r"(3d_spatial|non_spatial|spatial|color|shape|texture|numeracy|complex)(_val|_train|\.)", name)
    return found[1] if found else None


def check_category(category: str | None, file_name: str) -> str:
    """Raises ValueError for one that is not measured here, or for none."""
    if category not in MEASURES:
        given = f"{shorten(category)} of {plain(shorten(file_name))}" if category else plain(shorten(file_name))
        reason = " 3D places need a depth map, which no measure here has." if category == "3d_spatial" else ""
        raise ValueError(
            f"Category unknown: got {given}, expected one of {', '.join(MEASURES)}.{reason} Name it with --category, "
            f"or keep the official name of the prompt file."
        )
    return category


# What a prompt has to say for a measure to find something in it.
READ = {"attributes": noun_phrases, "places": find_relation, "numbers": find_counts}
UNREAD = {"attributes": "no noun phrase, score 1", "places": "no relation, score 0", "numbers": "no number, score 0"}


def describe_reading(category: str, prompts: Iterable[str]) -> list[str]:
    """How the prompts of a category were read, in lines: by what, and how many of them said nothing to a measure."""
    prompts, lines = list(prompts), []
    if "attributes" in MEASURES[category]:
        lines.append("Noun phrases are cut by a rule, in place of spaCy's model.")
    if {"places", "numbers"} & set(MEASURES[category]):
        lines.append("Things are found by another detector than UniDet: compare with numbers of the same one.")
    for measure in MEASURES[category]:
        unread = [prompt for prompt in prompts if measure in READ and not READ[measure](prompt)]
        if unread:
            lines.append(f"{len(unread)} of {len(prompts)} prompts: {UNREAD[measure]}, such as {shorten(unread[0])}.")
    return lines


class CompBench:
    """Scores pictures of one category.

    relations: of `complex`, for each prompt (lower case, up to the first full stop) that names it "spatial" or
    "action"; others count all three.
    """

    def __init__(self, category: str, tools: Tools, relations: Mapping[str, str] | None = None):
        self.category, self.tools, self.relations = category, tools, relations or {}

    def __call__(self, picture: Image.Image, prompt: str) -> dict[str, float]:
        """{name of a measure: 0 to 1}."""
        values = {name: getattr(self, f"_{name}")(picture, prompt) for name in MEASURES[self.category]}
        scores = {NAMES[name]: value for name, value in values.items()}
        if self.category == "complex":
            of = {"spatial": ("attributes", "places"), "action": ("attributes", "actions")}
            counted = of.get(self.relations.get(prompt_key(prompt), ""), tuple(values))
            scores[NAMES["mean"]] = sum(values[name] for name in counted) / len(counted)
        return scores

    def _attributes(self, picture: Image.Image, prompt: str) -> float:
        questions = [f"{phrase}?" for phrase in noun_phrases(prompt)[:MOST_PHRASES]]
        return math.prod(self.tools.vqa(picture, questions)) if questions else 1.0

    def _places(self, picture: Image.Image, prompt: str) -> float:
        relation = find_relation(prompt)
        if relation is None:
            return 0.0
        found = self.tools.detector.find(picture, list(dict.fromkeys((relation.first, relation.second))), LEAST_SCORE)
        return score_places(relation, found, min(picture.size))

    def _numbers(self, picture: Image.Image, prompt: str) -> float:
        counts = find_counts(prompt)
        found = self.tools.detector.find(picture, list(counts), LEAST_SCORE) if counts else []
        return score_numbers(counts, found)

    def _actions(self, picture: Image.Image, prompt: str) -> float:
        return self.tools.clip(picture, bare_nouns(prompt) if self.category == "complex" else prompt)


def prompt_key(prompt: str) -> str:
    return prompt.strip().split(".")[0].lower()


def read_relations(prompts: Path) -> dict[str, str]:
    """{prompt: "spatial" or "action"} of the two files beside the prompts of `complex`.

    Raises FileNotFoundError for one that lacks.
    """
    relations = {}
    for kind in ("spatial", "action"):
        path = prompts.with_name(f"{prompts.stem}_{kind}{prompts.suffix}")
        if not path.is_file():
            raise FileNotFoundError(
                f"Not found: got no {plain(shorten(path.name))} beside {plain(shorten(prompts.name))}, expected the "
                f"list of its prompts with a {kind} relation, which decides the 3-in-1 score. Put T2I-CompBench's file "
                f"there."
            )
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        relations |= {prompt_key(line.split("\t")[0]): kind for line in lines if line.strip()}
    return relations


def score_places(relation: Relation, found: list[Found], side_px: int) -> float:
    """Half for the two things, half for how they stand to each other; below a half nothing."""
    first = next((thing for thing in found if thing.name == relation.first), None)
    same = relation.first == relation.second
    second = next((thing for thing in found if thing.name == relation.second and not (same and thing is first)), None)
    score = sum(thing.score for thing in (first, second) if thing is not None) / 4
    if first is not None and second is not None:
        score += score_relation(relation.kind, first.box, second.box, side_px) / 2
    return score if score >= 0.5 else 0.0


def score_relation(kind: str, first: tuple, second: tuple, side_px: int) -> float:
    """1 where the first box stands to the second as `kind` says, less where they overlap or are far apart."""
    x, y = ((second[i] + second[i + 2] - first[i] - first[i + 2]) / 2 for i in (0, 1))
    if kind == "next to":
        near = NEAR_PX * side_px / SIDE_PX
        return 1.0 if min(abs(x), abs(y)) < near else near / max(abs(x), abs(y))
    along, across = (x, y) if kind in ("left", "right") else (y, x)
    towards = along if kind in ("left", "top") else -along
    if towards <= 0 or abs(along) <= abs(across):
        return 0.0
    shared = overlap(first, second)
    return 1.0 if shared < OVERLAP else OVERLAP / shared


def overlap(first: tuple, second: tuple) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    common = area(
        (max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3]))
    )
    whole = area(first) + area(second) - common
    return common / whole if whole else 0.0


def area(box: tuple) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def score_numbers(counts: Mapping[str, int], found: list[Found]) -> float:
    """Of each thing, half for being there and half for the right number."""
    seen = [sum(thing.name == name for thing in found) for name in counts]
    parts = [
        0.5 * (number > 0) + 0.5 * (number == wanted) for number, wanted in zip(seen, counts.values(), strict=True)
    ]
    return sum(parts) / len(parts) if parts else 0.0
