"""The timestep sequences of the originals, the sigma table, and its inverse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixart_pack.samplers.schedules import (
    ENDS_CLEAN,
    SCHEDULES,
    log_alpha_bar,
    schedule_sigmas,
    sigmas,
    timesteps_from_sigmas,
)
from pixart_pack.tests.goldens import load_golden

CONTINUOUS = sorted(SCHEDULES.keys() - ENDS_CLEAN)


def test_sigma_table_constants():
    values = sigmas([0.0, 999.0, -1.0])
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx([0.0100005, 157.40728, 0.0], abs=5e-6)
    assert log_alpha_bar(999).exp().item() == pytest.approx(4.035829765e-5, rel=1e-9)
    assert log_alpha_bar(0).exp().item() == pytest.approx(0.9999, rel=1e-12)


@given(st.floats(-1.0, 999.0))
def test_times_and_sigmas_are_exact_inverses(timestep):
    assert timesteps_from_sigmas(sigmas(timestep)).item() == pytest.approx(timestep, abs=1e-9)


@given(st.floats(0.0, 157.4))
def test_sigmas_and_times_are_exact_inverses(sigma):
    assert sigmas(timesteps_from_sigmas(sigma)).item() == pytest.approx(sigma, rel=1e-9, abs=1e-7)


def test_inverse_of_float32_sigmas_is_good_enough_for_integer_times():
    times = torch.arange(1000.0, dtype=torch.float64)
    assert (timesteps_from_sigmas(sigmas(times).float()) - times).abs().max() < 2e-5


def test_times_out_of_range_are_clamped():
    assert timesteps_from_sigmas([0.0, 1e9]).tolist() == [-1.0, 999.0]
    assert sigmas([-5.0, 2000.0]).tolist() == sigmas([-1.0, 999.0]).tolist()


@pytest.mark.parametrize("case", ["sampler_dpmsolverpp_alpha", "sampler_sa_solver"])
def test_uniform_is_the_originals(case):
    for run in load_golden(case)[0]["runs"].values():
        table = run["timesteps_table_f64"]
        times = SCHEDULES["uniform"](run["steps"])
        assert (times / 1000 + 1e-3).tolist() == pytest.approx(table["t"], abs=1e-12)
        assert (-sigmas(times).log()).tolist() == pytest.approx(table["lambda"], abs=1e-10)


def test_respaced_grids_are_the_originals():
    for case, name in (("sampler_iddpm", "iddpm"), ("sampler_ddim", None)):
        for run in load_golden(case)[0]["runs"].values():
            schedule = name or ("ddim" if run["timestep_respacing"].startswith("ddim") else "iddpm")
            assert SCHEDULES[schedule](run["nfe"]).tolist() == run["timestep_map"][::-1]


def test_integer_grids_are_the_originals():
    for run in load_golden("sampler_sa_solver_scheduler")[0]["runs"].values():
        spacing = run["scheduler_kwargs"].get("timestep_spacing", "linspace")
        assert SCHEDULES[spacing](run["steps"]).tolist() == [*run["timesteps_table_f64"]["timesteps"], 0]


@pytest.mark.parametrize(
    ("steps", "official", "diffusers"),
    [
        (1, [999], [999]),
        (2, [999, 499], [999, 499]),
        (3, [999, 679, 359], [999, 679, 339]),
        (4, [999, 759, 519, 279], [999, 759, 499, 259]),
        (6, [999, 839, 679, 519, 359, 199], [999, 839, 679, 499, 339, 179]),
        (8, [999, 879, 759, 639, 519, 399, 279, 159], [999, 879, 759, 639, 499, 379, 259, 139]),
    ],
)
def test_lcm_grids(steps, official, diffusers):
    assert SCHEDULES["lcm"](steps).tolist() == official
    assert SCHEDULES["lcm_diffusers"](steps).tolist() == diffusers


def test_kl_optimal_is_in_equal_angles():
    angles = schedule_sigmas("kl_optimal", 9).atan()
    assert (-angles.diff()).tolist() == pytest.approx([(angles[0] - angles[-1]).item() / 9] * 9, rel=1e-6)


def test_dmd_is_t_400():
    assert SCHEDULES["dmd"](1).tolist() == [400.0]


STEPS = {"dmd": [1], "ddim": [2, 5, 8]}


@pytest.mark.parametrize(
    ("name", "steps"), [(name, steps) for name in SCHEDULES for steps in STEPS.get(name, [1, 2, 5, 8])]
)
@pytest.mark.parametrize("denoise", [1.0, 0.6, 0.25])
def test_every_schedule_descends_from_the_first_time(name, denoise, steps):
    levels = schedule_sigmas(name, steps, denoise)
    assert len(levels) == steps + 1
    assert (levels.diff() < 0).all()
    times = SCHEDULES[name](steps, denoise=denoise)
    assert times.dtype == torch.float64
    assert len(times) == steps + (name not in ENDS_CLEAN)
    assert 0.0 <= times.min() and times.max() <= 999.0 * denoise + 0.5
    assert torch.equal(sigmas(times), levels[: len(times)])


@pytest.mark.parametrize("name", CONTINUOUS)
def test_end_clean_replaces_the_last_level(name):
    plain, clean = schedule_sigmas(name, 6), schedule_sigmas(name, 6, end_clean=True)
    assert torch.equal(plain[:-1], clean[:-1])
    assert plain[-1].item() == pytest.approx(0.0100005, abs=1e-7) and clean[-1] == 0.0


def test_lists_always_end_clean(caplog):
    assert schedule_sigmas("lcm", 4, end_clean=False)[-1] == 0.0
    assert "always ends at a clean picture" in caplog.text


@pytest.mark.parametrize(
    ("name", "steps", "denoise", "message"),
    [
        ("uniform", 0, 1.0, "Too few steps: got 0"),
        ("karras", 4, 0.0, "Denoise is out of range: got 0.0"),
        ("iddpm", 4, 1.5, "Denoise is out of range: got 1.5"),
        ("linspace", 1200, 1.0, "Too many steps for the linspace schedule: got 1200"),
        ("trailing", 1200, 1.0, "Too many steps for the trailing schedule: got 1200"),
        ("iddpm", 1200, 1.0, "Too many steps for the iddpm schedule: got 1200"),
        ("ddim", 1, 1.0, "No integer stride gives this many DDIM steps: got 1"),
        ("ddim", 999, 1.0, "No integer stride gives this many DDIM steps: got 999"),
        ("lcm", 51, 1.0, "Too many LCM steps: got 51, expected at most 50"),
        ("lcm", 30, 0.5, "Too many LCM steps: got 30, expected at most 25"),
        ("dmd", 2, 1.0, "DMD takes a single step: got 2"),
        ("cosine", 4, 1.0, "Unknown schedule: got 'cosine'"),
    ],
)
def test_bad_input(name, steps, denoise, message):
    with pytest.raises(ValueError, match=message):
        schedule_sigmas(name, steps, denoise)
