"""Attention to a reference: the same as over both pictures' tokens at once, off at strength 0, row by row."""

import math

import pytest
import torch

from pixart_pack.pixart.layers import attend
from pixart_pack.pixart.reference.attention import Reader, Recorder, Reference, ReferencedModel, sigma_at
from pixart_pack.pixart.solvers import schedule_sigmas, timesteps_where_sigmas_are
from pixart_pack.pixart.transformer import BlockInputs
from pixart_pack.tests.rounding import assert_equal_to_rounding
from pixart_pack.tests.tiny_pixart import make_model, tiny_config


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["alpha-512", "sigma-1024"])
def model(request):
    fields = {"kv_compress_ratio": 2, "kv_compress_layers": (1,)} if request.param == "sigma-1024" else {}
    return make_model(tiny_config(request.param, **fields)).requires_grad_(False)


def call(model, latent, time=600.0, rows=1, reference=None, caption=None):
    caption = random(rows, 5, tiny_config().caption_channels, seed=3) if caption is None else caption
    called = model if reference is None else ReferencedModel(model, reference)
    return called(latent, torch.tensor([time]), caption)


@pytest.mark.parametrize("strength", [0.25, 1.0, 3.0])
def test_each_token_of_the_reference_counts_by_its_strength(strength):
    """Against the sum over all tokens, written out."""
    q, k, v, more_k, more_v = (random(2, 6, 8, seed=seed) for seed in range(5))
    inputs = BlockInputs(None, None, None, (2, 3), attend, attend)
    found = Reader({0: (more_k, more_v)}, strength).place(inputs, 0).self_attention(q, k, v, 2)
    split = lambda x: x.unflatten(2, (2, 4)).transpose(1, 2)  # noqa: E731
    logits = split(q) @ torch.cat([split(k), split(more_k)], 2).mT / math.sqrt(4)
    weights = logits.exp() * torch.cat([torch.ones(6), torch.full((6,), strength)])
    weights = weights / weights.sum(-1, keepdim=True)
    expected = (weights @ torch.cat([split(v), split(more_v)], 2)).transpose(1, 2).flatten(2)
    assert_equal_to_rounding(found, expected, 16)


def test_the_recorder_keeps_what_each_block_reads():
    q, k, v = (random(1, 6, 8, seed=seed) for seed in range(3))
    inputs, recorder = BlockInputs(None, None, None, (2, 3), attend, attend), Recorder()
    assert torch.equal(recorder.place(inputs, 4).self_attention(q, k, v, 2), attend(q, k, v, 2))
    assert recorder.keys[4][0] is k and recorder.keys[4][1] is v


def test_a_reference_that_is_the_picture_changes_nothing(model):
    """Every key is there twice, with the same value: the weighted mean stays."""
    latent, sigma = random(1, 4, 8, 8), sigma_at(torch.tensor([600.0])).float()
    clean = latent * (1 + sigma**2).sqrt() - sigma * Reference.of(latent).noise
    assert_equal_to_rounding(call(model, latent, reference=Reference.of(clean)), call(model, latent), 512)


def test_a_reference_changes_the_picture_within_its_part_of_the_sampling_alone(model):
    latent, other = random(1, 4, 8, 8), random(1, 4, 12, 6, seed=9) * 3
    plain = {time: call(model, latent, time) for time in (900.0, 600.0, 100.0)}
    reference = Reference.of(other, start=0.2, end=0.7)
    for time, before in plain.items():
        after = call(model, latent, time, reference=reference)
        assert torch.equal(before, after) == (time != 600.0)
    off = Reference.of(other, strength=0.0)
    assert torch.equal(call(model, latent, reference=off), plain[600.0])
    weak, strong = (
        (call(model, latent, reference=Reference.of(other, strength=s)) - plain[600.0]).abs().mean() for s in (0.01, 1)
    )
    assert 0 < weak < strong


def test_a_batch_is_its_pictures_alone(model):
    latents, references = random(3, 4, 8, 8), random(3, 4, 8, 6, seed=5)
    captions = random(3, 5, tiny_config().caption_channels, seed=7)
    for given in (references, references[:1]):
        together = call(model, latents, reference=Reference.of(given), caption=captions)
        for row in range(3):
            own = Reference.of(given[row % len(given)][None])
            alone = call(model, latents[row : row + 1], reference=own, caption=captions[row : row + 1])
            assert_equal_to_rounding(together[row : row + 1], alone, 256)


def test_noise_levels_of_a_batch_are_tiled_over_its_prompts():
    reference, sigma = Reference.of(random(2, 4, 4, 4)), torch.tensor([1.0, 9.0])
    noisy = reference.noised(sigma, 4)
    assert torch.equal(noisy[:2], noisy[2:])
    for row in range(2):
        expected = (reference.latent[row] + sigma[row] * reference.noise[row]) / (1 + sigma[row] ** 2).sqrt()
        assert_equal_to_rounding(noisy[row], expected, 8)


def test_noise_levels_are_those_of_the_schedule():
    levels = schedule_sigmas("uniform", 10)[:-1]
    times = torch.stack([timesteps_where_sigmas_are(level) for level in levels])
    torch.testing.assert_close(sigma_at(times), levels.double(), rtol=1e-4, atol=0)
