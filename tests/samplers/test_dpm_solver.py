"""DPM-Solver++ against the original's trajectories, its orders of convergence, and bad input."""

import functools

import pytest
import torch

from pixart_pack.benchmarks.mixture import GaussianMixture
from pixart_pack.pixart.config import PixArtConfig
from pixart_pack.pixart.transformer import PixArt
from pixart_pack.samplers import SAMPLERS
from pixart_pack.samplers.dpm_solver import sample_dpm_solver
from pixart_pack.samplers.schedules import schedule_sigmas, timesteps_from_sigmas
from pixart_pack.tests.goldens import load_golden, take
from pixart_pack.tests.mixture import ReferenceRun, reference_runs

RULES = {"sampler_dpmsolverpp_alpha": "short_runs", "sampler_dpmsolverpp_sigma": "always"}


def mixture():
    _, tensors = load_golden("sampler_dpmsolverpp_alpha")
    return GaussianMixture(*(tensors[f"gmm.{name}"] for name in ("mu", "s", "logw")))


def start(levels, count=16):
    noise = torch.randn(count, 4, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise * (1.0 + levels[0] ** 2).sqrt()


def solve(steps, **options):
    levels = schedule_sigmas("log_snr", steps)
    return sample_dpm_solver(mixture(), start(levels), levels, disable=True, **options)


@functools.cache
def exact():
    """The solution of the ODE to 3e-7: four times finer than the finest run measured, at order 3."""
    return solve(960, order=3)


@pytest.mark.parametrize(("case", "run", "output"), reference_runs(*RULES))
def test_original_trajectories(case, run, output):
    steps = load_golden(case)[0]["runs"][run]["steps"]
    reference = ReferenceRun(case, run, output, schedule_sigmas("uniform", steps))
    reference.check(
        sample_dpm_solver(
            reference.denoise, reference.start, reference.levels, disable=True, lower_order_final=RULES[case]
        )
    )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence(order):
    coarse, fine = ((solve(steps, order=order) - exact()).square().mean().sqrt() for steps in (120, 240))
    assert abs(torch.log2(coarse / fine).item() - order) < 0.2


@pytest.mark.parametrize("order", [1, 2, 3])
def test_last_step_to_sigma_zero_gives_the_denoised_latent(order):
    levels = schedule_sigmas("uniform", 12, end_clean=True)
    seen = []
    result = sample_dpm_solver(
        mixture(), start(levels), levels, callback=seen.append, disable=True, order=order, lower_order_final="never"
    )
    assert torch.equal(result, seen[-1]["denoised"])
    assert [state["i"] for state in seen] == list(range(12))


@pytest.mark.parametrize("order", [2, 3])
def test_a_step_from_time_zero_to_sigma_zero_only_denoises(order):
    """The steps before it, orders included, are those of a run that ends at t = 0."""
    levels = schedule_sigmas("kl_optimal", 7)
    x, clean = start(levels), torch.cat([levels, levels.new_zeros(1)])
    expected = sample_dpm_solver(mixture(), x, levels, disable=True, order=order)
    result = sample_dpm_solver(mixture(), x, clean, disable=True, order=order)
    assert torch.equal(result, mixture()(expected, levels[-1:].expand(len(x))))


def test_the_step_to_time_zero_is_of_first_order_by_default():
    """Extrapolated to second order, as PixArt-alpha does in runs of 10 steps or more, it has more error."""
    levels = schedule_sigmas("uniform", 14)
    truth = exact()
    default, alpha = (
        (sample_dpm_solver(mixture(), start(levels), levels, disable=True, **options) - truth).square().mean()
        for options in ({}, {"lower_order_final": "short_runs"})
    )
    assert default < 0.5 * alpha


def test_pipeline_through_the_network():
    case, tensors = load_golden("pipeline_alpha_tiny")
    shape = case["config"]
    config = PixArtConfig(
        depth=shape["depth"],
        hidden_size=shape["hidden_size"],
        num_heads=shape["num_heads"],
        caption_channels=shape["caption_channels"],
        caption_length=shape["model_max_length"],
        base_size=shape["input_size"] // 2,
        pe_scale=shape["lewei_scale"],
        micro_condition=False,
    )
    network = PixArt(config)
    network.load_state_dict({k: v for k, v in take(tensors, "weights").items() if k != "pos_embed"})
    network.eval()
    caption, mask = tensors["input.y"], tensors["input.mask"].bool()
    null = tensors["weights.y_embedder.y_embedding"].expand(len(caption), -1, -1)

    @torch.no_grad()
    def guided(x, sigma):
        timestep = timesteps_from_sigmas(sigma[0]).to(x).expand(2 * len(x))
        scaled = (x / (1.0 + sigma[0] ** 2).sqrt()).repeat(2, 1, 1, 1)
        noise = network(scaled, timestep, torch.cat([caption.squeeze(1), null]), mask.repeat(2, 1))[:, :4]
        conditional, unconditional = noise.chunk(2)
        return x - sigma[0] * (unconditional + 4.5 * (conditional - unconditional))

    levels = schedule_sigmas("uniform", 14).float()
    x = tensors["input.z"] * (1.0 + levels[0] ** 2).sqrt()
    result = sample_dpm_solver(guided, x, levels, disable=True, lower_order_final="short_runs")
    torch.testing.assert_close(
        result / (1.0 + levels[-1] ** 2).sqrt(),
        tensors["output.dpms"],
        atol=case["tolerance"]["suggested_atol"],
        rtol=case["tolerance"]["suggested_rtol"],
    )


def test_order_beyond_the_steps_is_lowered_with_a_warning(caplog):
    assert torch.equal(solve(2, order=3), solve(2, order=2))
    assert "order 3 has only 2 steps" in caplog.text


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "dmd"])
@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "Too few sigmas: got 0, expected at least 2"),
        ([1.0], "Too few sigmas: got 1, expected at least 2"),
        ([1.0, 2.0], "Sigmas do not descend: got 1 followed by 2"),
        ([2.0, 1.0, 1.0, 0.0], "Sigmas do not descend: got 1 followed by 1"),
        ([1.0, -0.1], "Sigmas do not descend: got 1 followed by -0.1"),
        ([float("nan"), 1.0], "Sigmas do not descend: got nan"),
    ],
)
def test_bad_sigmas(sampler, levels, message):
    with pytest.raises(ValueError, match=message):
        SAMPLERS[sampler](mixture(), torch.zeros(1, 4, 1, 2), torch.tensor(levels), disable=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "order is out of range: got 4"),
        ({"lower_order_final": "no"}, "Unknown lower_order_final: got 'no'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        solve(4, **options)


@pytest.mark.parametrize("options", [{"algorithm": "dpm"}, {"second": "heun"}, {"third": "midpoint"}])
def test_unknown_rules_are_refused(options):
    with pytest.raises(ValueError, match="Unknown (algorithm|weights) of DPM-Solver"):
        solve(2, **options)
