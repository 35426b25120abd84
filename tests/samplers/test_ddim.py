"""DDIM against the original's trajectories and the distillation solver's step."""

import pytest
import torch

from pixart_pack.samplers.ddim import sample_ddim
from pixart_pack.samplers.schedules import log_alpha_bar, schedule_sigmas, sigmas
from pixart_pack.tests.goldens import load_golden
from pixart_pack.tests.mixture import ReferenceRun, reference_runs


@pytest.mark.parametrize(("case", "run", "output"), reference_runs("sampler_ddim"))
def test_original_trajectories(case, run, output):
    settings = load_golden(case)[0]["runs"][run]
    schedule = "ddim" if settings["timestep_respacing"].startswith("ddim") else "iddpm"
    reference = ReferenceRun(case, run, output, schedule_sigmas(schedule, settings["nfe"]))
    result = sample_ddim(
        reference.denoise,
        reference.start,
        reference.levels,
        disable=True,
        noise_sampler=reference.noise_sampler(),
        eta=settings["eta"],
        clip_denoised=settings["clip_denoised"],
    )
    reference.check(result)


@pytest.mark.parametrize(
    ("output", "dtype", "tolerance"), [("output", torch.float32, 2e-4), ("output_f64", torch.float64, 1e-6)]
)
def test_step_of_the_distillation_solver(output, dtype, tolerance):
    _, tensors = load_golden("losses_lcm")
    grid = tensors["output.ddim_timesteps"]
    for row, index in enumerate(tensors["input.index"].tolist()):
        previous = grid[index - 1].item() if index else 0
        levels = sigmas([grid[index].item(), previous]).to(dtype)
        picture, noise = (tensors[f"input.{name}"][row : row + 1].to(dtype) for name in ("pred_x0", "pred_noise"))
        result = sample_ddim(lambda x, sigma, p=picture: p, picture + levels[0] * noise, levels, disable=True)
        result = result * (0.5 * log_alpha_bar(previous)).exp().to(dtype)
        expected = tensors[f"{output}.ddim_step"][row : row + 1].to(dtype)
        assert (result - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_bad_eta(eta):
    with pytest.raises(ValueError, match=f"eta is out of range: got {eta}"):
        sample_ddim(None, torch.zeros(1, 4, 2, 2), [1.0, 0.0], eta=eta)
