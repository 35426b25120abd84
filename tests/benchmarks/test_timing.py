"""The benchmarks' clock: rivals take turns, the first round does not count, and the work is counted right."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixart_pack.benchmarks.timing import Roofline, compare, compare_loops, count_work, take_turns, take_turns_in_steps
from pixart_pack.pixart.transformer import PixArt
from pixart_pack.tests.tiny_pixart import tiny_config


def test_rivals_take_turns():
    calls = []
    rivals = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = take_turns(rivals, 2, "wall", "cpu")
    assert calls == ["a", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_what_warms_up_may_be_less():
    calls = []
    seconds = take_turns({"a": lambda: calls.append("a")}, 2, "cpu", "cpu", {"a": lambda: calls.append("short")})
    assert calls == ["short", "a", "a"] and len(seconds["a"]) == 2


def test_ratio_is_of_pairs():
    found = compare({"a": [1.0, 4.0, 3.0], "b": [2.0, 4.0, 2.0]}, "a", "b")
    assert found == {"ratio": 1.0, "least": 0.5, "greatest": 1.5}


def loop_of(name, steps, calls):
    def loop(stepped):
        for step in range(steps):
            calls.append(f"{name}{step}")
            stepped(step, "what a host's callback is given")

    return loop


def test_steps_take_turns():
    calls = []
    seconds = take_turns_in_steps({"a": loop_of("a", 2, calls), "b": loop_of("b", 3, calls)}, "cpu", "cpu")
    assert calls == ["a0", "b0", "a1", "b1", "b2"]
    assert [len(times) for times in seconds.values()] == [2, 3] and min(map(min, seconds.values())) >= 0


def test_a_loop_that_fails_ends_the_race_with_its_error():
    def failing(stepped):
        stepped()
        raise OSError("no model")

    calls = []
    with pytest.raises(OSError, match="no model"):
        take_turns_in_steps({"a": failing, "b": loop_of("b", 3, calls)}, "wall", "cpu")
    assert len(calls) == 3


def test_ratio_of_loops_is_of_their_sums():
    found = compare_loops({"a": [9.0, 1.0, 1.0, 2.0], "b": [1.0, 1.0, 2.0, 2.0]}, "a", "b")
    assert found == {"ratio": 13 / 6, "least": 1.0, "greatest": 1.0}
    assert compare_loops({"a": [3.0], "b": [2.0]}, "a", "b") == {"ratio": 1.5, "least": 1.5, "greatest": 1.5}


def test_roofline_is_the_slower_of_both():
    assert Roofline(10.0, 5.0).seconds(20.0, 5.0) == 2.0
    assert Roofline(10.0, 5.0).seconds(20.0, 50.0) == 10.0


def test_work_is_what_pytorch_counts():
    """Within the few per cent that embedders, modulation and the last layer take, which are not counted."""
    counter = pytest.importorskip("torch.utils.flop_counter").FlopCounterMode(display=False)
    config = tiny_config("sigma-512", hidden_size=192, depth=6)
    model = PixArt(config).eval()
    with torch.no_grad():
        caption = model.project_caption(torch.randn(2, 7, config.caption_channels))
        with sdpa_kernel(SDPBackend.MATH), counter:  # the fused one is not counted
            model(torch.randn(2, 4, 32, 32), torch.tensor([5.0]), caption)
    operations, _ = count_work(config, 2, 256, 7, 4)
    assert 0.9 < operations / counter.get_total_flops() <= 1.0
