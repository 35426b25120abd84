"""Node schemas on hosts of different ages, and what every node has in common when it runs.

Fields that an older host does not know are left out of a schema.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from .folders import hide_paths

MOST_LETTERS = 20_000  # of what a node shows or says
# Only these may be missing, so that a misspelt field still raises TypeError.
NEWER_FIELDS = frozenset(
    {"accept_all_inputs", "advanced", "essentials_category", "has_intermediate_output", "is_dev_only", "search_aliases"}
)


@functools.cache  # a signature takes longer than all else in the description of a node
def _missing(factory: Callable) -> frozenset[str]:
    return NEWER_FIELDS - inspect.signature(factory).parameters.keys()


def _make(factory: Callable, *args, **fields) -> Any:
    missing = _missing(factory)
    return factory(*args, **{name: value for name, value in fields.items() if name not in missing})


def schema(**fields) -> io.Schema:
    """Make an io.Schema, without the NEWER_FIELDS that this host does not know. Raises TypeError for other names."""
    return _make(io.Schema, **fields)


def node_input(io_type: type, name: str, **fields) -> io.Input:
    """Make io_type.Input(name, **fields) in the same way: node_input(io.Int, "steps", default=20, advanced=True)."""
    return _make(io_type.Input, name, **fields)


def choice_input(name: str, choices: Iterable[str], **fields) -> io.Input:
    """Make an optional input with a list to choose from; its default is the first choice unless `fields` name one."""
    choices = list(choices)
    return node_input(io.Combo, name, options=choices, optional=True, **{"default": choices[0], **fields})


def percent_input(name: str, default: float, tooltip: str, **fields) -> io.Input:
    """Make an input for a part of the sampling, from 0 to 1."""
    usual = {"default": default, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": tooltip}
    return node_input(io.Float, name, **{**usual, **fields})


def seed_input(tooltip: str, **fields) -> io.Input:
    """Make an optional input `seed` of 64 bits."""
    return node_input(io.Int, "seed", default=0, min=0, max=2**64 - 1, optional=True, tooltip=tooltip, **fields)


def missing_output(message: str) -> ExecutionBlocker:
    """What an output gives that has no value: a node that is connected to it stops with this message."""
    return ExecutionBlocker(message)


def guard(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """A node that refuses numbers which are none, and whose words are bounded and hide where the server's folders lie.

    The host lets NaN through, which is neither below the least nor above the most.
    """
    run = node.execute.__func__
    if hasattr(run, "__wrapped__"):
        return node

    @functools.wraps(run)
    def execute(cls, *args, **inputs):
        for name, value in inputs.items():
            _check_finite(name, value)
        try:
            output = run(cls, *args, **inputs)
        except Exception as error:
            _clean_error(error)
            raise
        shown = getattr(output, "ui", None)
        if isinstance(shown, ui.PreviewText):
            shown.value = _clean(shown.value)
        elif isinstance(shown, dict) and "text" in shown:
            output.ui = {**shown, "text": [_clean(each) for each in shown["text"]]}
        return output

    node.execute = classmethod(execute)
    return node


def _check_finite(name: str, value) -> None:
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, float) and not math.isfinite(each):
            raise ValueError(f"Number that is none: got {name} = {each}, expected a finite one. Enter a number.")


def _clean(text: str) -> str:
    text = hide_paths(text)
    return (
        text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]} ... and {len(text) - MOST_LETTERS} letters more"
    )


def _clean_error(error: Exception) -> None:
    error.args = tuple(_clean(each) if isinstance(each, str) else each for each in error.args)
    if isinstance(error, OSError):
        for name in ("filename", "filename2"):
            path = getattr(error, name)
            if isinstance(path, str):
                setattr(error, name, hide_paths(path))
