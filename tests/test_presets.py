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
