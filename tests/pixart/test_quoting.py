"""Foreign text in messages: one line, printable, bounded."""

import time
from pathlib import PurePosixPath

import pytest

from pixart_pack.pixart.quoting import list_names, shorten

HOSTILE = {
    "long": "x" * 10**6,
    "controls": "a\x00b\x1b[31mc\r\nd\x7f\x9b",
    "direction": "model\u202egpj.pth\u2066\u200f\u061c",
    "lines": "a\u2028b\u2029c\x85d",
    "half a pair": "\ud800",
    "bytes": bytes(10**6),
    "list": ["x" * 10**5] * 1000,
    "dict": {f"key {index}" * 1000: "\n" for index in range(1000)},
    "integer": 10**100_000,
    "integers": [10**100_000] * 100,
    "error": ValueError("first\nsecond\u202e" + "x" * 10**6),
    "object": [object()],
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("length", [8, 80, 200])
def test_whatever_comes_is_one_short_printable_line(name, length):
    shown = shorten(HOSTILE[name], length)
    assert 0 < len(shown) <= length and shown.isprintable()


def test_depth_and_cycles_are_bounded():
    deep = ()
    for _ in range(300_000):
        deep = (deep,)
    circle = []
    circle.append(circle)
    start = time.process_time()
    for value in (deep, circle, {0: deep}, [deep] * 10**5):
        assert len(shorten(value)) <= 80
    assert time.process_time() - start < 1


def test_what_is_short_looks_as_in_python():
    for value in (
        "blocks.0.attn.qkv.weight",
        "it's",
        "像素",
        b"\x89PNG",
        4,
        -2.5,
        None,
        True,
        [1, "a"],
        {"a": (1,)},
        {3},
    ):
        assert shorten(value) == repr(value)
    assert shorten(PurePosixPath("a/b")) == "PurePosixPath('a/b')"
    assert shorten(object()) == "<object>"
    assert shorten(ValueError("no 'bias' in it")) == "no 'bias' in it"


def test_what_is_long_keeps_both_ends():
    shown = shorten("blocks." + "x" * 1000 + ".weight")
    assert len(shown) == 80 and shown.startswith("'blocks.x") and shown.endswith(".weight'") and "..." in shown


def test_names_are_listed_up_to_a_number():
    assert list_names(["a", "b c"]) == "a, b c" and list_names([]) == ""
    assert list_names({"a": 1, "b": 2, "c": 3}, most=2) == "a, b, and 1 more"
    shown = list_names(["x\u202e\n" * 10**5] * 1000)
    assert len(shown) < 550 and shown.isprintable() and shown.endswith("and 992 more")
