"""The diffusion's tables and losses, against the original's numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixart_pack.pixart.diffusion import Diffusion, alphas_cumprod, make_betas, respaced_betas
from pixart_pack.tests.goldens import load_golden, take

CASE, TENSORS = load_golden("losses_training")
INPUTS = take(TENSORS, "input")
HUNDRED = torch.tensor([round(k * 999 / 99) for k in range(100)])
# float32: the tolerance measured with the case, as the bound cancels numbers up to 100 and the tables are gathered in
# float32, as in the original. float64: what is left of the results' storage in float32.
TOLERANCES = {
    torch.float32: {name: CASE["tolerance"][f"suggested_{name}"] for name in ("rtol", "atol")},
    torch.float64: {"rtol": 1e-6, "atol": 1e-6},
}
RESULTS = {torch.float32: "output", torch.float64: "output_f64"}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])


def case_inputs(dtype):
    start, noise, prediction = (INPUTS[name].to(dtype) for name in ("x0", "noise", "model_output"))
    return start, noise, prediction


def check(actual, name, dtype):
    expected = TENSORS[f"{RESULTS[dtype]}.{name}"].to(dtype)
    torch.testing.assert_close(actual, expected, **TOLERANCES[dtype], msg=lambda text: f"{name}: {text}")


@DTYPES
@pytest.mark.parametrize("run", ["default", "snr", "no_sigma", "respaced100"])
def test_losses_equal_the_original(run, dtype):
    start, noise, prediction = case_inputs(dtype)
    timestep = torch.tensor(CASE["runs"][run]["t_index_used"])
    diffusion = Diffusion(respaced_betas(HUNDRED) if run == "respaced100" else None)
    noisy = diffusion.q_sample(start, timestep, noise)
    check(noisy, f"{run}.x_t", dtype)
    if run == "no_sigma":
        prediction = prediction[:, : start.shape[1]]
    losses = diffusion.training_losses(prediction, start, noisy, timestep, noise, snr=run == "snr")
    assert set(losses) == {"loss", "mse"} | ({"vb"} if run != "no_sigma" else set())
    for name, values in losses.items():
        check(values, f"{run}.{name}", dtype)


def test_respaced_timesteps_are_those_the_original_showed_its_model():
    run = CASE["runs"]["respaced100"]
    assert HUNDRED[torch.tensor(run["t_index_used"])].tolist() == run["t_seen_by_model"]


@DTYPES
def test_posteriors_equal_the_original(dtype):
    start, noise, prediction = case_inputs(dtype)
    timestep, diffusion = INPUTS["t"], Diffusion()
    noisy = diffusion.q_sample(start, timestep, noise)
    predicted, variance = prediction.chunk(2, dim=1)
    mean, log_variance = diffusion.model_posterior(noisy, timestep, predicted, variance)
    true_mean, true_log_variance = diffusion.posterior(start, noisy, timestep)
    check(mean, "detail.p_mean", dtype)
    check(log_variance, "detail.p_log_variance", dtype)
    check(true_mean, "detail.q_post_mean", dtype)
    check(true_log_variance, "detail.q_post_log_variance", dtype)
    check(diffusion.predict_start(noisy, timestep, predicted), "detail.pred_xstart", dtype)
    check(diffusion.predict_start(noisy, timestep, predicted), "return_startx.ret1_pred_x0", dtype)


def test_bound_trains_the_variance_alone():
    start, noise, prediction = case_inputs(torch.float32)
    prediction.requires_grad_()
    noisy = Diffusion().q_sample(start, INPUTS["t"], noise)
    Diffusion().training_losses(prediction, start, noisy, INPUTS["t"], noise)["vb"].sum().backward()
    assert not prediction.grad[:, :4].any()
    assert prediction.grad[:, 4:].any()


def test_schedule():
    betas = make_betas()
    assert betas.dtype == torch.float64 and len(betas) == 1000
    assert betas[0].item() == 1e-4 and betas[-1].item() == pytest.approx(0.02, abs=1e-18)
    assert alphas_cumprod()[999].item() == pytest.approx(math.prod(1 - b for b in betas.tolist()), rel=1e-12)
    torch.testing.assert_close(respaced_betas(torch.arange(1000)), betas, rtol=1e-12, atol=1e-15)


@given(st.integers(0, 999), st.integers(0, 2**32 - 1))
def test_predicted_start_undoes_the_noising(timestep, seed):
    generator = torch.Generator().manual_seed(seed)
    start, noise = torch.randn(2, 1, 4, 2, 2, dtype=torch.float64, generator=generator)
    time = torch.tensor([timestep])
    noisy = Diffusion().q_sample(start, time, noise)
    # At t = 999 rounding is multiplied by 157.
    torch.testing.assert_close(Diffusion().predict_start(noisy, time, noise), start, rtol=0, atol=1e-12)
