"""Comparing settings: the values of one or two axes, and every combination of them."""

from dataclasses import dataclass

from ..quoting import shorten

CELL_LIMIT = 400  # more than anyone looks at, and hours of work by a slip of the keyboard

_NUMBER_LIMIT = 64  # letters; Python makes infinity of thousands of digits
HEADING_LIMIT = 2000  # letters, more than T5 reads of a caption


@dataclass(frozen=True)
class Axis:
    """name: what varies, for the headings. values: numbers, truth values or texts."""

    name: str
    values: tuple

    def headings(self) -> list[str]:
        """One heading for each value; empty where there is nothing to tell apart."""
        return [_heading(self.name, value) for value in self.values] if self.name or len(self.values) > 1 else [""]


def _heading(name: str, value) -> str:
    """In full as long as a sheet can show it: drawing takes time for each letter."""
    text = f"{name} {value}".strip()
    return text if len(text) <= HEADING_LIMIT else f"{text[:HEADING_LIMIT]}..."


def parse_axis(name: str, text: str) -> Axis:
    """An axis from its name and values: one on each line, or, on a single line, between commas.

    Whole and decimal numbers become numbers, true and false truth values; a text in quotes stays one.
    Raises ValueError when there are none, or more than CELL_LIMIT.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) == 1 and lines[0][0] not in "\"'":
        lines = [value.strip() for value in lines[0].split(",") if value.strip()]
    if not lines:
        raise ValueError(
            f"Axis without values: got an empty text for {shorten(name)}, expected one value on each line. "
            f"Write the values to compare."
        )
    if len(lines) > CELL_LIMIT:
        raise ValueError(
            f"Too many values: got {len(lines)} for {shorten(name)}, expected at most {CELL_LIMIT}. Compare fewer "
            f"values at a time."
        )
    return Axis(name.strip(), tuple(map(parse_value, lines)))


def parse_value(text: str) -> int | float | bool | str:
    """`14` -> 14, `4.5` -> 4.5, `true` -> True, `"14"` -> "14", all else as it is."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float) if len(text) <= _NUMBER_LIMIT else ():
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class Grid:
    """Two axes. Cells are counted row by row: y goes down, x to the right."""

    x: Axis
    y: Axis

    def __post_init__(self):
        cells = len(self.x.values) * len(self.y.values)
        if cells > CELL_LIMIT:
            raise ValueError(
                f"Too many cells: got {cells}, expected at most {CELL_LIMIT}. Compare fewer values at a time."
            )

    def cells(self) -> list[tuple]:
        """(value of x, value of y) of every cell."""
        return [(x, y) for y in self.y.values for x in self.x.values]

    def labels(self) -> list[str]:
        """What distinguishes each cell."""
        return [", ".join(filter(None, (x, y))) for y in self.y.headings() for x in self.x.headings()]
