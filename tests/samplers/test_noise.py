"""Noise that depends on the seed and the sample's index, not on the batch."""

import pytest
import torch

from pixart_pack.samplers.noise import SampleNoise, batch_seeds, noise_source, scramble


def draw(like, seed):
    return noise_source(like, extra_args={"seed": seed})(1.0, 0.5)


def test_sample_i_draws_what_seed_plus_i_draws():
    batch = SampleNoise(torch.zeros(4, 4, 3, 5), batch_seeds(11, 4))
    singles = [SampleNoise(torch.zeros(1, 4, 3, 5), [11 + i]) for i in range(4)]
    for _ in range(3):
        assert torch.equal(batch(1.0, 0.5), torch.cat([single(1.0, 0.5) for single in singles]))


def test_step_noise_is_not_the_initial_noise_of_the_same_seed():
    initial = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert not torch.allclose(draw(torch.zeros(1, 4, 8, 8), 5)[0], initial)


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_seed_a_host_can_send(seed):
    assert torch.isfinite(draw(torch.zeros(2, 3), seed)).all()


def test_without_a_seed_noise_differs_from_run_to_run():
    like = torch.zeros(1, 4, 4, 4)
    assert not torch.equal(noise_source(like)(1.0, 0.5), noise_source(like)(1.0, 0.5))


def test_the_dtype_is_that_of_the_latent_and_the_values_are_shared():
    single, double = (draw(torch.zeros(1, 4, dtype=dtype), 1) for dtype in (torch.float32, torch.float64))
    assert double.dtype == torch.float64
    assert torch.equal(single.double(), double)


def test_the_callers_noise_comes_first():
    assert noise_source(torch.zeros(1), noise_sampler=max) is max


def test_scrambled_seeds_do_not_collide():
    assert len({scramble(seed) for seed in range(5000)}) == 5000
