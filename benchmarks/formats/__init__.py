"""Which formats that people bring are read, and how near to what the package that wrote them computes.

`python dev.py run -m pixart_pack.benchmarks.formats` writes the table of docs/models.md. Each row makes a tiny file
with the real package, reads it, and compares. A further kind of file is a module with ROWS, named in MODULES.
"""

import importlib
import logging
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..report import markdown_table

MODULES = ("text_encoders", "transformers", "wrappers")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- formats: begin -->", "<!-- formats: end -->"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """error: the largest difference from what the package makes of the same file, relative to the largest number.
    cosine: to the model before it was quantised.
    """

    error: float
    cosine: float


@dataclass(frozen=True)
class Row:
    """make: a folder -> the file or folder in it. measure: that path -> Found; ValueError where it is refused.

    least_cosine: that the form allows. refused: whether it is to be refused by name.
    """

    what: str
    form: str
    package: str
    make: Callable[[Path], Path]
    measure: Callable[[Path], Found]
    least_cosine: float = 0.99
    refused: bool = False


def rows() -> list[Row]:
    """The rows of all MODULES."""
    return [row for name in MODULES for row in importlib.import_module(f".{name}", __package__).ROWS]


def describe(row: Row) -> list[str]:
    """One line of the table; makes and reads the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = row.make(Path(folder))
        try:
            found = row.measure(path)
        except ValueError as error:
            log.info("%s, %s: %s", row.what, row.form, error)
            return [row.what, row.form, row.package, "refused by name", "", ""]
    return [row.what, row.form, row.package, "read", f"{found.error:.0e}", f"{found.cosine:.4f}"]


def write_table(lines: Iterable[list[str]], page: Path = PAGE) -> None:
    """Put the table between its marks on the page."""
    head = ["what", "form", "written by", "it is", "error against that package", "cosine to the unquantised"]
    text = page.read_text(encoding="utf-8")
    start, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{start}{BEGIN}\n{markdown_table(head, list(lines))}{END}{tail}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Write the table again."""
    write_table([describe(row) for row in rows()])
