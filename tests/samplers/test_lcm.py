"""LCM against the original's trajectories and boundary scalings."""

import pytest
import torch

from pixart_pack.benchmarks.mixture import GaussianMixture
from pixart_pack.samplers.lcm import boundary_scalings, sample_lcm
from pixart_pack.samplers.schedules import schedule_sigmas
from pixart_pack.tests.goldens import load_golden
from pixart_pack.tests.mixture import ReferenceRun, reference_runs


@pytest.mark.parametrize(("case", "run", "output"), reference_runs("sampler_lcm"))
def test_original_trajectories(case, run, output):
    settings = load_golden(case)[0]["runs"][run]
    reference = ReferenceRun(case, run, output, schedule_sigmas("lcm", settings["steps"]))
    result = sample_lcm(
        reference.denoise, reference.start, reference.levels, disable=True, noise_sampler=reference.noise_sampler()
    )
    reference.check(result)


def test_boundary_scalings():
    _, tensors = load_golden("losses_lcm")
    timesteps = tensors["input.t"]
    for dtype, output, tolerance in ((torch.float32, "output", 2e-4), (torch.float64, "output_f64", 1e-6)):
        for value, name in zip(boundary_scalings(timesteps.to(dtype)), ("c_skip", "c_out"), strict=True):
            torch.testing.assert_close(
                value.float(), tensors[f"{output}.{name}"], rtol=tolerance, atol=0.0 if name == "c_skip" else 1e-7
            )


def test_guidance_is_the_models_affair():
    _, tensors = load_golden("sampler_lcm")
    parts = [tensors[f"gmm.{name}"] for name in ("mu", "s", "logw")]
    condition = tensors["input.cond_logits"]
    levels = schedule_sigmas("lcm", 4)
    x = tensors["input.x_T"].double() * levels[0]
    unguided, guided = (
        sample_lcm(GaussianMixture(*parts, condition, guidance), x, levels, {"seed": 1}, disable=True)
        for guidance in (1.0, 4.5)
    )
    assert torch.isfinite(guided).all()
    assert not torch.allclose(unguided, guided)


def test_batch_does_not_change_a_sample():
    _, tensors = load_golden("sampler_lcm")
    model = GaussianMixture(*(tensors[f"gmm.{name}"] for name in ("mu", "s", "logw")))
    levels = schedule_sigmas("lcm", 4)
    x = tensors["input.x_T"].double() * levels[0]
    together = sample_lcm(model, x, levels, {"seed": 40}, disable=True)
    for i in range(len(x)):
        torch.testing.assert_close(
            together[i : i + 1], sample_lcm(model, x[i : i + 1], levels, {"seed": 40 + i}, disable=True)
        )


@pytest.mark.parametrize("steps", range(1, 9))
def test_every_official_step_count_runs(steps):
    levels = schedule_sigmas("lcm", steps)
    seen = []
    result = sample_lcm(lambda x, sigma: x * 0.1, torch.ones(1, 4, 2, 2), levels, callback=seen.append, disable=True)
    assert len(seen) == steps
    assert torch.isfinite(result).all()
