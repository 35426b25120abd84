"""DMD: one evaluation at t = 400 of noise with unit variance."""

import pytest
import torch

from pixart_pack.samplers.dmd import sample_dmd
from pixart_pack.samplers.schedules import schedule_sigmas, timesteps_from_sigmas

LEVELS = schedule_sigmas("dmd", 1)
NOISE = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("pure_noise", "x"), [(True, NOISE * LEVELS[0]), (False, NOISE * (1 + LEVELS[0] ** 2).sqrt())])
def test_the_model_sees_unit_noise_at_400(pure_noise, x):
    seen = []

    def model(x, sigma):
        seen.append((x / (1.0 + sigma[0] ** 2).sqrt(), timesteps_from_sigmas(sigma[0]).item()))
        return x * 0.5

    result = sample_dmd(model, x, LEVELS, disable=True, pure_noise=pure_noise)
    ((scaled, timestep),) = seen
    torch.testing.assert_close(scaled, NOISE)
    assert timestep == pytest.approx(400.0, abs=1e-9)
    torch.testing.assert_close(result, 0.5 * NOISE * (1 + LEVELS[0] ** 2).sqrt())


@pytest.mark.parametrize(
    ("levels", "message"), [([2.0, 1.0, 0.0], "got 2 steps to sigma 0"), ([2.0, 0.01], "got 1 steps to sigma 0.01")]
)
def test_more_than_one_step(levels, message):
    with pytest.raises(ValueError, match=message):
        sample_dmd(None, NOISE, torch.tensor(levels))
