"""Several captions of one picture: lines of a text, tags in another order or left out, words before and behind."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ...files.names import is_blank
from ...quoting import shorten

MOST_VARIANTS = 100
_TRIES = 4  # for each variant, since few tags have few orders


@dataclass(frozen=True)
class CaptionVariety:
    """How captions are varied before they are encoded. Each variant is encoded and stored; a training draws one a step.

    several: each line of a text, and each entry of a source's list, is a caption of its own; otherwise the whole text
    is one, and of a list the first. variants: how many there are of a picture where tags are shuffled or left out.
    shuffle: tags in another order in each. drop_tags: share of tags that a variant leaves out. keep_tags: so many at
    the beginning stay as they are. separator: between tags. trigger: words at the beginning of all that have them not.
    prefix, suffix: text before and behind all.
    Raises ValueError for numbers out of range.
    """

    several: bool = False
    variants: int = 4
    shuffle: bool = False
    drop_tags: float = 0.0
    keep_tags: int = 0
    separator: str = ","
    trigger: str = ""
    prefix: str = ""
    suffix: str = ""

    def __post_init__(self):
        _check("caption variants", self.variants, 1, MOST_VARIANTS)
        _check("share of tags to leave out", self.drop_tags, 0, 0.99)
        _check("number of tags to keep", self.keep_tags, 0, 1000)
        if not self.separator:
            raise ValueError("No separator of tags: got an empty one, expected such as ','. Enter one.")

    @property
    def is_random(self) -> bool:
        """Whether variants differ by chance."""
        return self.shuffle or self.drop_tags > 0

    @property
    def changes(self) -> bool:
        """Whether any caption would be another one."""
        return self.several or self.is_random or bool(self.trigger or self.prefix.strip() or self.suffix.strip())

    def of(self, caption: str, others: Sequence[str] = ()) -> tuple[str, ...]:
        """The captions of a picture, each once; told by its texts alone."""
        texts = [text for each in (caption, *others) for text in each.splitlines()] if self.several else [caption]
        texts = [text.strip() for text in texts if not is_blank(text)] or [caption]
        if not self.is_random:
            return tuple(dict.fromkeys(self._vary(text, 0) for text in texts))
        count, found = max(self.variants, len(texts)), {}
        for number in range(count * _TRIES):
            found.setdefault(self._vary(texts[number % len(texts)], number))
            if len(found) == count:
                break
        return tuple(found)

    def _vary(self, text: str, number: int) -> str:
        if self.is_random:
            text = self._with_other_tags(text, Random(f"{number} {text}"))  # the same in every process
        if self.trigger and self.trigger.casefold() not in text.casefold():
            text = f"{self.trigger}{self._joint}{text}" if text else self.trigger
        return " ".join(filter(None, (self.prefix.strip(), text, self.suffix.strip())))

    @property
    def _joint(self) -> str:
        return self.separator if self.separator.isspace() else f"{self.separator} "

    def _with_other_tags(self, text: str, rng: Random) -> str:
        tags = [tag.strip() for tag in text.split(self.separator) if tag.strip()]
        first, rest = tags[: self.keep_tags], tags[self.keep_tags :]
        kept = [tag for tag in rest if rng.random() >= self.drop_tags]
        if not (first or kept):
            kept = rest[:1]
        if self.shuffle:
            rng.shuffle(kept)
        return self._joint.join(first + kept)


def _check(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(
            f"Out of range: got {shorten(value)} as {what}, expected a number from {low:g} to {high:g}. Correct it."
        )
