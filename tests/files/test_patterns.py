"""Patterns of strangers over names of layers."""

import time

import pytest

from pixart_pack.pixart.files.patterns import compile_pattern
from pixart_pack.pixart.training.settings import TARGETS

NAME = "blocks.27.cross_attn.kv_linear.adapter_of_a_long_name"


@pytest.mark.parametrize(
    "pattern",
    [
        *filter(None, TARGETS.values()),
        r"(?:.*\.)?(attn|mlp)\.\w+",
        r"[*+?()]+x",
        r"\(\)\*\+\?a",
        r"^(?!.*mlp).*\.\d{1,2}$",
    ],
)
def test_usual_patterns_are_compiled(pattern):
    assert compile_pattern(pattern).pattern == pattern


@pytest.mark.parametrize(
    "pattern",
    ["(.+)+!", "(?:a|a)*b", "((.*))+x", "(a?){40}", "a?" * 40 + "a" * 40, ".*.*.*.*.*!", "(", "[", "a{9999999999999}"],
)
def test_what_takes_hours_or_is_none_is_refused(pattern):
    with pytest.raises(ValueError, match=r"."):
        compile_pattern(pattern)


@pytest.mark.parametrize("pattern", [".*.*.*.*!", "(.*)(.*)(.*)(.*)!", r"\w*.*\w*.*!", "x" * 999])
def test_what_is_taken_ends_soon(pattern):
    found = compile_pattern(pattern)
    start = time.process_time()
    assert not found.fullmatch(NAME)
    assert time.process_time() - start < 0.2
