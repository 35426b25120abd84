"""The published settings name what exists."""

import inspect

import pytest

from pixart_pack.samplers import SAMPLERS
from pixart_pack.samplers.presets import PRESETS
from pixart_pack.samplers.schedules import schedule_sigmas


@pytest.mark.parametrize("name", PRESETS)
def test_sampler_options_and_schedule_exist(name):
    preset = PRESETS[name]
    assert preset.options.keys() <= inspect.signature(SAMPLERS[preset.sampler]).parameters.keys()
    assert len(schedule_sigmas(preset.schedule, preset.steps)) == preset.steps + 1
    assert name.endswith(f" {preset.steps}")
    assert name.startswith("sigma" if preset.is_sigma else "alpha")


def test_alpha_presets_have_the_rules_of_the_original():
    """What the solvers do otherwise unless told."""
    assert PRESETS["alpha DPM-Solver++ 14"].options["lower_order_final"] == "short_runs"
    assert PRESETS["alpha DPM-Solver++ 20"].options["lower_order_final"] == "short_runs"
    assert PRESETS["alpha SA-Solver 25"].options == {"few_steps": True}
    defaults = {name: inspect.signature(SAMPLERS[name]).parameters for name in SAMPLERS}
    assert defaults["dpm_solver"]["lower_order_final"].default == "always"
    assert defaults["sa_solver"]["few_steps"].default is False
