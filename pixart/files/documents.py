"""JSON and YAML by strangers, within bounds of size and depth; what is beyond them is refused in words.

The messages of the errors are short and stand within brackets in a longer one, which names the file.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

from ..quoting import plain, shorten
from .regular import read_text

DEPTH_LIMIT = 64  # of lists and objects within each other; Python's own readers go down some thousand and then fail
JSON_LIMIT = 2**26
TABLE_LIMIT = 2**32  # of files with a row for each picture of a large data set
YAML_LIMIT = 20_000  # characters, which take half a second; all settings of a training are two thousand


def parse_json(text: str | bytes, limit: int = JSON_LIMIT) -> Any:
    """The value of a text of at most `limit` characters. Raises ValueError, also beyond DEPTH_LIMIT."""
    _check_size(len(text), limit)
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise _too_deep() from error
    _check_depth(value)
    return value


def load_json(path: str | os.PathLike, limit: int = JSON_LIMIT) -> Any:
    """The value of a regular file of at most `limit` bytes in UTF-8. Raises OSError, and ValueError as parse_json."""
    path = Path(path)
    _check_size(path.stat().st_size, limit)
    return parse_json(read_text(path, limit), limit)


def parse_yaml(text: str) -> Any:
    """The value of a text of at most YAML_LIMIT characters, with plain values alone; None for an empty one.

    Raises ValueError for what is no YAML, for anchors and aliases (a few lines of them stand for gigabytes), for tags,
    names that are given twice, and lists more than DEPTH_LIMIT deep.
    """
    import yaml

    _check_size(len(text), YAML_LIMIT)
    _check_brackets(text)
    try:
        return yaml.load(text, _plain_loader())  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        words = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{plain(words, 200)}{place}") from error
    except (yaml.YAMLError, ValueError, ArithmeticError) as error:  # of a date or number that there is not
        raise ValueError(shorten(error, 300)) from error
    except RecursionError as error:
        raise _too_deep() from error


@functools.cache
def _plain_loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain values, each written once and where it stands."""

        depth = 0

        def compose_node(self, parent, index):
            event = self.peek_event()
            if getattr(event, "anchor", None) is not None:
                raise _error("anchors and aliases such as &x and *x are not read", event)
            if getattr(event, "tag", None) is not None:
                raise _error(f"tags are not read: {shorten(event.tag, 40)}", event)
            self.depth += 1
            if self.depth > DEPTH_LIMIT:
                raise _too_deep()
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node, deep=False):
            names = set()
            for key, _ in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else None
                if name is not None and name in names:
                    raise _error(f"{shorten(name, 40)} is given twice", key)
                names.add(name)
            return super().construct_mapping(node, deep)

    def _error(problem, place):
        return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)

    return Loader


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"{size} characters, and at most {limit} are read")


def _check_depth(value: Any) -> None:
    """Level by level, since a function that calls itself fails where it should count."""
    level = [value]
    for _ in range(DEPTH_LIMIT):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [each for values in inner for each in values if isinstance(each, dict | list)]
        if not level:
            return
    raise _too_deep()


def _check_brackets(text: str) -> None:
    """Before the reader of YAML sees them: its work grows with the square of their depth."""
    depth = 0
    for sign in text:
        depth = depth + 1 if sign in "[{" else max(0, depth - 1) if sign in "]}" else depth
        if depth > DEPTH_LIMIT:
            raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"lists or objects more than {DEPTH_LIMIT} deep")
