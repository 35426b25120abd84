"""Bins, prompt flags and the resize after sampling, against the originals' decisions and numbers."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixart_pack.pixart.resolution import (
    ASPECT_RATIOS,
    INFERENCE_ASPECT_RATIOS,
    crop_centre,
    nearest_bin,
    nearest_ratio,
    parse_prompt_flags,
    resize_and_crop,
    resize_to_cover,
)
from pixart_pack.tests import hostile_texts
from pixart_pack.tests.goldens import load_golden

BINS, _ = load_golden("bins")
POST_RESIZE, POST_RESIZE_TENSORS = load_golden("resize_and_crop")


def as_table(golden):
    return {float(ratio): tuple(int(side) for side in size) for ratio, size in golden.items()}


@pytest.mark.parametrize("base_px", [256, 512, 1024, 2048])
def test_tables_equal_the_originals_in_order(base_px):
    full = as_table(BINS["tables"][f"ASPECT_RATIO_{base_px}"])
    inference = as_table(BINS["tables_diffusers"][str(base_px)])
    assert list(ASPECT_RATIOS[base_px].items()) == list(full.items())
    assert list(INFERENCE_ASPECT_RATIOS[base_px].items()) == list(inference.items())
    assert all(side % 16 == 0 for size in full.values() for side in size)


@pytest.mark.parametrize("case", BINS["decisions"], ids=lambda case: f"{case['h']}x{case['w']}")
def test_nearest_bin_decides_as_the_originals(case):
    for base_px in ASPECT_RATIOS:
        original = case["repo"][str(base_px)]
        assert nearest_bin(case["h"], case["w"], base_px) == tuple(original["hw"])
        assert nearest_ratio(case["h"], case["w"], base_px) == original["ratio"]
        chosen = nearest_bin(case["h"], case["w"], base_px, inference_only=True)
        assert chosen == tuple(case["diffusers"][str(base_px)])


@pytest.mark.parametrize("case", BINS["prompt_flags"]["cases"], ids=lambda case: case["table"] + case["prompt"])
def test_prompt_flags(case):
    base_px = int(case["table"].removesuffix("_TEST"))
    flags = parse_prompt_flags(case["prompt"], base_px, inference_only=True)
    assert flags.prompt == case["prompt_clean"]
    assert list(flags.bin_px) == case["hw"]
    assert list(flags.output_px) == case["custom_hw"]
    assert torch.tensor([flags.ratio]).tolist() == case["ar"]  # the golden went through float32


@pytest.mark.parametrize("name", hostile_texts.FLAGS)
def test_flags_that_mean_harm_take_a_moment(name):
    """Python takes no number of thousands of digits, and no ratio of numbers of hundreds."""
    start = time.process_time()
    try:
        parse_prompt_flags(hostile_texts.FLAGS[name], 1024)
    except ValueError as error:
        assert "Prompt flag out of range: got --" in str(error) and len(str(error)) < 300
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("prompt", ["a cat --ar 0:1", "a cat --ar 1:0", "a cat --hw 0:5"])
def test_prompt_flags_refuse_zero(prompt):
    with pytest.raises(ValueError, match="Picture size out of range"):
        parse_prompt_flags(prompt, 512)


@pytest.mark.parametrize("case", POST_RESIZE["cases"], ids=lambda case: str(case["i"]))
def test_resize_and_crop_numbers(case):
    images = POST_RESIZE_TENSORS[f"input.{case['i']}"]
    atol = POST_RESIZE["tolerance"]["suggested_atol"]
    for name, repository_rule in (("repo", True), ("diffusers", False)):
        got = resize_and_crop(images, *case["new_hw"], repository_rule=repository_rule)
        torch.testing.assert_close(got, POST_RESIZE_TENSORS[f"output_{name}.{case['i']}"], atol=atol, rtol=0)


@pytest.mark.parametrize("case", BINS["resize_and_crop_shapes"], ids=lambda case: f"{case['in_hw']}-{case['new_hw']}")
def test_resize_and_crop_shapes(case):
    images = torch.zeros(1, 1, *case["in_hw"])
    assert list(resize_and_crop(images, *case["new_hw"]).shape[-2:]) == case["diffusers_out_hw"]
    assert list(resize_and_crop(images, *case["new_hw"], repository_rule=True).shape[-2:]) == case["repo_out_hw"]


sides = st.integers(1, 97)


@given(sides, sides, sides, sides, st.booleans())
def test_resize_and_crop_always_gives_the_wanted_size(h, w, new_h, new_w, repository_rule):
    images = torch.ones(1, 1, h, w)
    got = resize_and_crop(images, new_h, new_w, repository_rule=repository_rule)
    skipped = repository_rule and (h == new_h or w == new_w)
    assert got.shape[-2:] == ((h, w) if skipped else (new_h, new_w))
    torch.testing.assert_close(got, torch.ones_like(got))


def test_resize_to_cover_keeps_the_ratio():
    images = torch.rand(1, 3, 60, 80)
    covered = resize_to_cover(images, 32, 32, mode="bicubic", antialias=True)
    assert covered.shape == (1, 3, 32, 42)
    assert torch.equal(crop_centre(covered, 32, 32), covered[..., 5:37])


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="got 300, expected one of 256, 512, 1024, 2048"):
        nearest_bin(512, 512, 300)
    with pytest.raises(ValueError, match="got 0x512"):
        nearest_bin(512, 0, 512)
