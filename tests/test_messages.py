"""What errors show of others' words is bounded: read off every f-string within a raise."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for room in ("pixart", "samplers", "nodes") for path in (ROOT / room).rglob("*.py"))
BOUNDED = ("shorten(", "plain(", "list_names(", "reprlib.repr(")
CONSTANTS = re.compile(r"'[^']*'\.join\((?:map\(str, )?(?:[A-Z_]+|\w+\.[A-Z_]+)\)?\)|[A-Z_]+")
# Shown in quotes, as Python's notation, as a list or as an error, and yet bounded. Reviewed one by one.
REVIEWED = {
    "__name__": "of our own module",
    "name": "of an attribute in our own code, in pixart/__init__.py",
    "default": "a setting's, from our own table",
    "device.type": "one of torch's",
    "control": "one of our own choices",
    "type(error).__name__": "a class",
    "error": "another message of the pack, which is bounded, with a name before it",
    "', '.join(allowed)": "our own choices",
    "', '.join(kinds)": "our own suffixes",
    "', '.join(choices)": "our own choices",
    "', '.join(sorted(known))": "the names of our own settings",
    "' or '.join(kind.layouts)": "our own layouts",
    "' and no '.join(missing)": "our own inputs",
    "' and '.join(missing)": "our own inputs",
    "', '.join(map(str, tables))": "our own sizes",
}


def shown_words(source: str) -> list[tuple[int, str]]:
    """(line, expression) of what the f-strings of a raise show of values that may be text."""
    found = []
    raised = (node.exc for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise) and node.exc)
    for text in (each for exc in raised for each in ast.walk(exc) if isinstance(each, ast.JoinedStr)):
        for before, value, after in zip([None, *text.values], text.values, [*text.values[1:], None], strict=False):
            if isinstance(value, ast.FormattedValue):
                expression = ast.unparse(value.value)
                quoted = _ends(before, -1) and _ends(after, 0)
                if quoted or value.conversion != -1 or re.search(r"\berror\b|\.join\(", expression):
                    found.append((value.lineno, expression))
    return found


def _ends(part: ast.expr | None, place: int) -> bool:
    return isinstance(part, ast.Constant) and part.value[place] in "'\""


def is_bounded(expression: str) -> bool:
    return expression.startswith(BOUNDED) or CONSTANTS.fullmatch(expression) is not None or expression in REVIEWED


def test_the_words_are_seen():
    source = (
        """raise ValueError(f"got '{a}', {b!r}, {error}, {', '.join(c)}, {3} and '{shorten(d)}' of {' or '.join(E)}")"""
    )
    found = [expression for _, expression in shown_words(source)]
    assert found == ["a", "b", "error", "', '.join(c)", "shorten(d)", "' or '.join(E)"]
    assert [is_bounded(each) for each in found] == [False, False, True, False, True, True]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_errors_show_little_of_others_words(path):
    words = shown_words(path.read_text(encoding="utf-8"))
    assert [f"line {line}: {each}" for line, each in words if not is_bounded(each)] == []


def test_the_list_of_what_was_reviewed_holds_nothing_else():
    used = {each for path in FILES for _, each in shown_words(path.read_text(encoding="utf-8"))}
    assert set(REVIEWED) <= used
