"""Guidance reuse: which steps compute both prompts, what is kept between them, and pictures without ComfyUI."""

import pytest
import torch

from pixart_pack.pixart.acceleration.guidance_reuse import HOLD, LINE, GuidanceReuse
from pixart_pack.pixart.sampling import Captions, Settings, sample_latents
from pixart_pack.samplers import SAMPLERS
from pixart_pack.tests.tiny_pixart import make_model, tiny_config

CONFIG = tiny_config("alpha-512")
LEVELS = [100.0, 50.0, 20.0, 10.0, 5.0, 1.0, 0.0]


def due(kept, levels):
    """Where a difference is computed, by whether it is recalled."""
    return [kept.recall("key", level) is None for level in levels]


def test_the_noise_level_decides_and_not_how_often_it_is_asked():
    kept = GuidanceReuse(3).begin(LEVELS)
    kept.keep("key", 100.0, torch.ones(1))
    assert due(kept, LEVELS[:6]) == [True, False, False, True, False, False]
    assert due(kept, LEVELS[:6]) == [True, False, False, True, False, False]
    between = [70.0, 30.0, 15.0, 7.0, 2.0]  # a solver of second order looks there
    assert due(kept, between) == [True, False, False, True, False]
    assert due(kept, [100.001, 50.0 * (1 + 1e-6), 10.0 * (1 - 1e-6), 400.0]) == [True, False, True, True]


def test_the_first_part_is_exact_and_unknown_is_computed():
    kept = GuidanceReuse(2, start_percent=0.5).begin(LEVELS)
    assert due(kept, [50.0]) == [True]
    kept.keep("key", 100.0, torch.ones(1))
    assert due(kept, LEVELS[:6]) == [True, True, True, False, True, False]
    assert kept.recall("another", 10.0) is None
    kept.clear()
    assert due(kept, [10.0]) == [True]


@pytest.mark.parametrize(("forecast", "expected"), [(HOLD, 2.0), (LINE, 3.0)])
def test_what_is_kept_goes_on(forecast, expected):
    """Along the logarithm of the noise level."""
    kept = GuidanceReuse(4, forecast).begin([1000.0, 300.0, 100.0, 10.0, 1.0, 0.0])
    kept.keep("key", 1000.0, torch.full((2,), 1.0))
    kept.keep("key", 100.0, torch.full((2,), 2.0))
    kept.keep("key", 100.0, torch.full((2,), 2.0))  # again at the same level, as Heun's solver does
    assert torch.allclose(kept.recall("key", 10.0), torch.full((2,), expected))
    assert torch.allclose(kept.recall("key", 300.0), torch.full((2,), 2.0))  # a solver that looks back


@pytest.mark.parametrize(("given", "message"), [((0,), "got 0, expected 1 or more"), ((2, "so"), "Unknown forecast")])
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        GuidanceReuse(*given)


def captions(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Captions.of([torch.randn(length, CONFIG.caption_channels, generator=generator) for length in lengths])


@pytest.fixture(scope="module")
def counted():
    """A model, and a list of the rows that it is called with."""
    model, rows = make_model(CONFIG), []
    model.x_embedder.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    return model, rows


def draw(model, reuse=None, solver="dpm_solver", guidance=4.5, steps=6, keep=True):
    settings = Settings(solver, steps=steps, guidance=guidance)
    return sample_latents(
        model, captions(7, 4), captions(1, 9, seed=1), 48, 64, [5, 6], settings, keep=keep, reuse=reuse
    )


@pytest.mark.parametrize("keep", [True, False])
def test_the_negative_is_left_out(counted, keep):
    """Captions of any length, in a batch."""
    model, rows = counted
    exact = draw(model, keep=keep)
    rows.clear()
    found = draw(model, GuidanceReuse(2), keep=keep)
    assert rows == [4, 2, 4, 2, 4, 2]
    assert not torch.equal(found, exact) and found.isfinite().all()
    assert torch.equal(draw(model, GuidanceReuse(1), keep=keep), exact)
    assert torch.equal(draw(model, GuidanceReuse(2, start_percent=1.0), keep=keep), exact)
    rows.clear()
    draw(model, GuidanceReuse(2), guidance=1.0, keep=keep)
    assert rows == [2] * 6


@pytest.mark.parametrize("solver", sorted(set(SAMPLERS) - {"dmd"}))  # which takes a single step
def test_a_difference_that_never_changes_is_exact(counted, solver):
    """Both captions alike: whatever is kept between them is naught, under every solver."""
    model, _ = counted
    settings, both = Settings(solver, steps=5), captions(5)
    given = (both, both, 32, 32, [3], settings)
    exact = sample_latents(model, *given, keep=True)
    # float32 noise of a batch of two in place of one, over five steps
    torch.testing.assert_close(
        sample_latents(model, *given, keep=True, reuse=GuidanceReuse(3, LINE)), exact, atol=1e-3, rtol=1e-4
    )
