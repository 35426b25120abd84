"""Models that go on at another size: what they draw before any training is what they drew."""

import pytest
import torch

from pixart_pack.pixart.stages.growth import GROWTHS, grow, grow_checkpoint, grown_config
from pixart_pack.pixart.stages.records import read_stages
from pixart_pack.pixart.transformer import PixArt
from pixart_pack.pixart.weights.reading import read_checkpoint
from pixart_pack.pixart.weights.saving import save_checkpoint
from pixart_pack.tests.rounding import assert_equal_to_rounding
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config


@pytest.fixture(scope="module")
def drawn():
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(2, 4, 16, 16, generator=generator)
    return (
        latent,
        torch.tensor([300.0, 800.0]),
        torch.randn(2, 120, tiny_config().caption_channels, generator=generator),
    )


def model_of(state, config):
    model = PixArt(config).eval().requires_grad_(False)
    model.load_state_dict(state)
    return model


def both(before, growth, drawn, **more):
    """Predictions before and after growing, of the same picture."""
    old = tiny_config(before)
    new = grown_config(old, growth)
    state = make_weights(old)
    grown = grow(state, old, new)
    return model_of(state, old)(*drawn, **more), model_of(grown, new)(*drawn, **more), new


@pytest.mark.parametrize(
    ("before", "growth"),
    [
        ("alpha-256", "512"), ("alpha-256", "1024"), ("alpha-512", "alpha-1024"), ("alpha-512", "sigma-512"),
        ("alpha-512", "sigma-2048"), ("sigma-256", "sigma-512"), ("sigma-512", "sigma-1024"),
        ("sigma-1024", "sigma-2048"), ("alpha-1024", "2048"),
    ],
)  # fmt: skip
def test_an_untrained_growth_draws_what_was_drawn(before, growth, drawn):
    was, now, _ = both(before, growth, drawn)
    assert_equal_to_rounding(now, was, 16)  # sums in another order


def test_new_size_conditions_have_no_effect_until_they_learn(drawn):
    old = tiny_config("alpha-512")
    new = grown_config(old, "alpha-1024")
    model = model_of(grow(make_weights(old), old, new), new)
    sizes = [torch.tensor([[512.0, 512.0]]), torch.tensor([[1024.0, 768.0]])]
    first, second = (model(*drawn, resolution=size, aspect_ratio=size[:, :1] / size[:, 1:]) for size in sizes)
    assert torch.equal(first, second)
    last = model.csize_embedder.mlp[2].weight.requires_grad_(True)
    model(*drawn).square().sum().backward()
    assert last.grad.abs().max() > 0


def test_left_size_conditions_stay_as_at_the_trained_size(drawn):
    size = {"resolution": torch.tensor([[1024.0, 1024.0]]), "aspect_ratio": torch.ones(1, 1)}
    was, now, new = both("alpha-1024", "sigma-1024", drawn, **size)
    assert not new.micro_condition
    assert_equal_to_rounding(now, was, 64)


def test_released_positions_of_alpha_are_not_kept(drawn):
    """Alpha's own stage from 256 to 512 px doubles the span of positions, as its released models have it."""
    was, now, new = both("alpha-256", "alpha-512", drawn)
    assert new.pe_scale == 1.0
    assert (was - now).abs().max() > 0.01


@pytest.mark.parametrize("growth", ["sigma-1024-kvcompress", "sigma-2048-kvcompress"])
def test_compression_begins_as_averages(growth):
    old = tiny_config("sigma-512")
    new = grown_config(old, growth)
    assert (new.kv_compress_ratio, new.kv_compress_layers) == (2, (1, 2))
    state = grow(make_weights(old), old, new)
    attn = model_of(state, new).blocks[2].attn
    keys = torch.randn(1, 16, 48)
    means = torch.nn.functional.avg_pool2d(keys.mT.unflatten(2, (4, 4)), 2).flatten(2).mT
    expected = torch.nn.functional.layer_norm(means, (48,), eps=attn.norm.eps)
    assert_equal_to_rounding(attn.compress_tokens(keys, (4, 4)), expected, 16)
    assert not hasattr(model_of(state, new).blocks[0].attn, "sr")


def test_a_sigma_has_its_tokens():
    old, state = tiny_config("alpha-512"), make_weights(tiny_config("alpha-512"))
    null = grow(state, old, grown_config(old, "sigma-512"))["y_embedder.y_embedding"]
    assert null.shape[0] == 300
    assert torch.equal(null[:120], state["y_embedder.y_embedding"])
    assert 0.5 < null[120:].std() * null.shape[1] ** 0.5 < 2


def test_its_file_says_what_it_grew_from(tmp_path):
    config = tiny_config("alpha-512")
    save_checkpoint(tmp_path / "a.safetensors", make_weights(config), config)
    grown = grow_checkpoint(read_checkpoint(tmp_path / "a.safetensors"), "sigma-1024-kvcompress")
    save_checkpoint(tmp_path / "b.safetensors", grown.state_dict, grown.config, metadata=grown.metadata)
    again = grow_checkpoint(read_checkpoint(tmp_path / "b.safetensors"), "2048")
    assert again.config.base_px == 2048
    assert again.config.pe_scale == 4.0
    assert read_checkpoint(tmp_path / "b.safetensors").config == grown.config
    assert read_stages(again.metadata) == (
        "grown from alpha at 512 px to Sigma at 1024 px (sigma-1024-kvcompress)",
        "grown from Sigma at 1024 px to Sigma at 2048 px (2048)",
    )


@pytest.mark.parametrize("growth", ["beta-512", "100", "32", "16384", "", "512px"])
def test_other_growths_are_refused(growth):
    with pytest.raises(ValueError, match=r"Unknown growth|Size out of range"):
        grown_config(tiny_config(), growth)


def test_every_released_stage_can_be_reached():
    for before in ("alpha-256", "alpha-1024", "sigma-512"):
        for growth in GROWTHS:
            new = grown_config(tiny_config(before), growth)
            model_of(grow(make_weights(tiny_config(before)), tiny_config(before), new), new)
