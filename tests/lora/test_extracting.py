"""The LoRA out of a difference: exact at full rank, the best at less, and never more than asked for."""

import pytest
import torch

from pixart_pack.pixart.lora import Difference, LowRank, Target
from pixart_pack.pixart.lora.extracting import extract_lora, factorize

NOISE = {"atol": 2e-5, "rtol": 1e-4}  # a singular value decomposition in float32


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (12, 4, 2, 2), (7, 1, 3, 3)])
def test_full_rank_is_exact(shape):
    difference = random(*shape)
    factor = factorize(difference, 1000)
    torch.testing.assert_close(factor.delta(difference), difference, **NOISE)
    assert factor.fits(shape)
    assert factor.scale == 1.0


def test_less_rank_is_the_best_there_is():
    difference = random(40, 20)
    values = torch.linalg.svdvals(difference)
    for rank in (1, 5, 19):
        factor = factorize(difference, rank)
        error = (difference - factor.delta(difference)).square().sum()
        assert factor.rank == rank
        torch.testing.assert_close(error, values[rank:].square().sum(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 1.0])
def test_energy_takes_no_more_rank_than_it_needs(energy):
    difference = random(40, 20)
    shares = torch.linalg.svdvals(difference).square().cumsum(0) / difference.square().sum()
    factor = factorize(difference, 1000, energy)
    assert shares[factor.rank - 1] >= energy - 1e-6
    assert factor.rank == 1 or shares[factor.rank - 2] < energy


def test_a_difference_of_low_rank_is_found_as_such():
    difference = random(30, 3) @ random(3, 50, seed=1)
    assert factorize(difference, 16).rank == 3


def weights(seed=None):
    names = {
        "blocks.0.attn.qkv.weight": (36, 12),
        "blocks.0.attn.qkv.bias": (36,),
        "blocks.0.scale_shift_table": (6, 12),
    }
    return {name: torch.zeros(shape) if seed is None else random(*shape, seed=seed) for name, shape in names.items()}


def run(tuned, base, rank=100, **settings):
    return extract_lora(base, lambda name: (tuned[name], base[name]), rank, **settings)


def test_small_parameters_are_kept_whole_or_left_out():
    factors, share = run(weights(3), weights())
    assert {target.name: type(factor) for target, factor in factors.items()} == {
        "blocks.0.attn.qkv.weight": LowRank,
        "blocks.0.attn.qkv.bias": Difference,
        "blocks.0.scale_shift_table": Difference,
    }
    assert share == pytest.approx(1.0)
    factors, share = run(weights(3), weights(), keep_small=False, rank=2)
    assert list(factors) == [Target("blocks.0.attn.qkv.weight")]
    assert 0 < share < 0.9


def test_progress_is_told_before_each_weight_and_may_end_the_work():
    told = []
    run(weights(3), weights(), report=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3)]

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(weights(3), weights(), report=stop)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "Nothing to extract: got rank 0"),
        ({"energy": 0.0}, "energy 0.0"),
        ({"energy": 1.5}, "energy 1.5"),
        ({}, "No difference between the models"),
    ],
)
def test_nothing_to_extract(settings, message):
    with pytest.raises(ValueError, match=message):
        run(weights(), weights(), **settings)


def test_a_broken_model_is_named():
    broken = weights(3)
    broken["blocks.0.attn.qkv.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Broken weights: got infinite values or no numbers in 'blocks\.0\.attn\.qkv"):
        run(broken, weights())
