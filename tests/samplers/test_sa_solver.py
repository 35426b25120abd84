"""SA-Solver against the original sampler and scheduler, its coefficients, orders, noise and bad input."""

import functools
import math

import mpmath
import pytest
import torch

from pixart_pack.benchmarks.mixture import GaussianMixture
from pixart_pack.samplers.dpm_solver import sample_dpm_solver
from pixart_pack.samplers.sa_solver import MODES, _Step, sample_sa_solver
from pixart_pack.samplers.schedules import schedule_sigmas, sigmas
from pixart_pack.tests.goldens import load_golden
from pixart_pack.tests.mixture import ReferenceRun, reference_runs


def mixture():
    _, tensors = load_golden("sampler_sa_solver")
    return GaussianMixture(*(tensors[f"gmm.{name}"] for name in ("mu", "s", "logw")))


def start(levels, count=16):
    """Quasi-random starts: means over few of them are those over many."""
    sobol = torch.quasirandom.SobolEngine(8, scramble=True, seed=0).draw(count, dtype=torch.float64)
    noise = torch.special.ndtri(sobol.clamp(1e-9, 1 - 1e-9)).view(count, 4, 1, 2)
    return noise * (1.0 + levels[0] ** 2).sqrt()


def solve(steps, schedule="uniform", count=16, seed=0, **options):
    levels = schedule_sigmas(schedule, steps)
    return sample_sa_solver(mixture(), start(levels, count), levels, {"seed": seed}, disable=True, **options)


@functools.cache
def exact(steps=960, count=16):
    """The solution of the ODE: 960 steps of order 3 are off by 3e-7, 240 by 2e-5."""
    levels = schedule_sigmas("log_snr", steps)
    return sample_dpm_solver(mixture(), start(levels, count), levels, disable=True, order=3)


@pytest.mark.parametrize(("case", "run", "output"), reference_runs("sampler_sa_solver"))
def test_original_sampler(case, run, output):
    settings = load_golden(case)[0]["runs"][run]
    reference = ReferenceRun(case, run, output, schedule_sigmas("uniform", settings["steps"]))
    result = sample_sa_solver(
        reference.denoise,
        reference.start,
        reference.levels,
        disable=True,
        noise_sampler=reference.noise_sampler(offset=1),
        tau=float(settings["eta"]),
        few_steps=True,
        predictor_order=settings["settings"]["predictor_order"],
        corrector_order=settings["settings"]["corrector_order"],
        mode=settings["settings"]["pc_mode"],
    )
    reference.check(result)


@pytest.mark.parametrize(("case", "run", "output"), reference_runs("sampler_sa_solver_scheduler"))
def test_original_scheduler(case, run, output):
    settings = load_golden(case)[0]["runs"][run]
    schedule = settings["scheduler_kwargs"].get("timestep_spacing", "linspace")
    reference = ReferenceRun(case, run, output, schedule_sigmas(schedule, settings["steps"]))
    result = sample_sa_solver(
        reference.denoise,
        reference.start,
        reference.levels,
        disable=True,
        noise_sampler=reference.noise_sampler(),
        tau=0.0 if settings["tau"] == "0" else 1.0,
        tau_at="source",
        few_steps=True,
    )
    reference.check(result)


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("h", [1e-12, 1e-7, 1e-3, 0.4, 2.7])
def test_step_equals_its_integral_to_the_last_digits(h, tau):
    """One predictor step of order 3 with outputs 1, u, u^2 against 50-digit quadrature of the paper's equation 14."""
    source, target = 1.3, 1.3 * math.exp(-h)
    nodes = [source, source * math.exp(0.9 * h), source * math.exp(2.1 * h)]
    with mpmath.workdps(50):
        width = mpmath.log(mpmath.mpf(source) / target)
        z = (1 + mpmath.mpf(tau) ** 2) * width
        points = [mpmath.log(mpmath.mpf(source) / node) / width for node in nodes]
        for power in range(3):
            values = [torch.tensor(float(u) ** power, dtype=torch.float64) for u in points]
            step = _Step(source, target, tau, None).advance(torch.zeros((), dtype=torch.float64), nodes, values, False)
            integral = z / (power + 1) * mpmath.hyp1f1(1, power + 2, -z)
            # The nodes' logarithms carry the rounding of their float64 levels, 2e-16 / h of a step.
            assert abs(step.item() / integral - 1) < 1e-13 + 2e-15 / h


@pytest.mark.parametrize(("order", "least"), [(1, 0.8), (2, 1.8), (3, 2.8)])
def test_order_of_convergence_of_the_ode(order, least):
    options = {"tau": 0.0, "predictor_order": order, "corrector_order": order}
    coarse, fine = ((solve(steps, "log_snr", **options) - exact()).square().mean().sqrt() for steps in (120, 240))
    assert torch.log2(coarse / fine).item() > least


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [5, 8, 10, 14, 20, 25, 50])
def test_ode_is_never_worse_than_dpm_solver_of_its_order(steps, order):
    truth = exact(240, 4096)
    levels = schedule_sigmas("uniform", steps)
    theirs = sample_dpm_solver(mixture(), start(levels, 4096), levels, disable=True, order=order)
    ours = solve(steps, count=4096, tau=0.0, predictor_order=order, corrector_order=order)
    error, their_error = ((result - truth).square().mean().item() for result in (ours, theirs))
    assert error <= their_error


@pytest.mark.parametrize("mode", MODES)
def test_a_step_from_time_zero_to_sigma_zero_only_denoises(mode):
    """The steps before it, orders included, are those of a run that ends at t = 0."""
    levels = schedule_sigmas("kl_optimal", 7)
    x, clean = start(levels), torch.cat([levels, levels.new_zeros(1)])
    options = {"extra_args": {"seed": 0}, "disable": True, "predictor_order": 3, "corrector_order": 3, "mode": mode}
    expected = mixture()(sample_sa_solver(mixture(), x, levels, **options), levels[-1:].expand(len(x)))
    result = sample_sa_solver(mixture(), x, clean, **options)
    # PECE goes on to correct the last step with the model's value at its end.
    torch.testing.assert_close(result, expected, atol=0.05 if mode == "PECE" else 0.0, rtol=0.0)


def test_batch_of_four_equals_four_batches_of_one():
    levels = schedule_sigmas("uniform", 8).float()
    x = start(levels, 4).float()
    together = sample_sa_solver(mixture(), x, levels, {"seed": 7}, disable=True)
    for i in range(4):
        alone = sample_sa_solver(mixture(), x[i : i + 1], levels, {"seed": 7 + i}, disable=True)
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-6, rtol=0.0)


def test_same_seed_same_latent():
    assert torch.equal(solve(6, seed=3), solve(6, seed=3))
    assert not torch.equal(solve(6, seed=3), solve(6, seed=4))


@pytest.mark.parametrize(
    ("interval", "unit"),
    [
        ((199.0, 799.0), "timestep"),
        ((799.0, 199.0), "timestep"),
        ((200 / 999, 800 / 999), "percent"),
        (sigmas([199.0, 799.0]).tolist(), "sigma"),
    ],
)
def test_tau_interval_in_every_unit(interval, unit):
    assert torch.equal(solve(10), solve(10, tau_interval=interval, tau_unit=unit))


def test_no_noise_is_drawn_where_tau_is_zero():
    drawn = []

    def draw(sigma, sigma_next):
        drawn.append(sigma)
        return torch.zeros(16, 4, 1, 2)

    solve(10, noise_sampler=draw)
    assert len(drawn) == 6  # the steps to t = 699.3, 599.4, ..., 199.8
    drawn.clear()
    solve(10, noise_sampler=draw, tau=0.0)
    assert not drawn


def test_distribution_of_the_sde():
    """Full noise all the way keeps the mixture's covariance."""
    generator = torch.Generator().manual_seed(1)

    def draw(sigma, sigma_next):
        return torch.randn(4096, 4, 1, 2, dtype=torch.float64, generator=generator)

    result = solve(60, "quadratic", count=4096, tau_interval=(0.0, 999.0), noise_sampler=draw)
    model = mixture()
    weights = model.log_weights.exp()
    mean = weights @ model.means
    spread = model.means - mean
    covariance = torch.einsum("k,ki,kj->ij", weights, spread, spread) + torch.eye(8) * (weights @ model.scales**2)
    measured = result.flatten(1)
    assert (measured.mean(0) - mean).abs().max() < 0.1
    assert (torch.cov(measured.T) - covariance).abs().max() < 0.25


def test_orders_beyond_the_steps_are_lowered_with_a_warning(caplog):
    assert torch.isfinite(solve(2, predictor_order=4, corrector_order=4)).all()
    assert "has only 2 steps" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor_order": 0}, "order is out of range: got predictor 0 and corrector 2"),
        ({"corrector_order": 5}, "order is out of range: got predictor 2 and corrector 5"),
        ({"mode": "PCE"}, "Unknown SA-Solver mode: got 'PCE'"),
        ({"tau": -1.0}, "Tau is negative: got -1.0"),
        ({"tau_at": "middle"}, "Unknown tau_at: got 'middle'"),
        ({"tau_interval": (0.2, 0.8), "tau_unit": "t"}, "Unknown tau unit: got 't'"),
        ({"noise_device": "tpu"}, "Unknown noise device: got 'tpu'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        solve(4, **options)
