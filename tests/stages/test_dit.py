"""A PixArt out of a DiT: the same at t = 500 without a class, from either layout, and bad files refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pixart_pack.pixart.stages.dit import read_dit, start_from_dit
from pixart_pack.pixart.stages.records import read_stages
from pixart_pack.pixart.transformer import PixArt
from pixart_pack.tests.rounding import assert_equal_to_rounding
from pixart_pack.tests.stages.tiny_dit import make_dit

SIZES = {"caption_channels": 32, "caption_length": 8}
NONE = 10  # the class after the others


def model_of(state, config) -> PixArt:
    model = PixArt(config).eval()
    model.load_state_dict(state)
    return model


def states_of(model: PixArt, latent, timestep, caption):
    """The tokens after every block, and the prediction."""
    states, hooks = [], []
    for block in model.blocks:
        hooks.append(block.register_forward_hook(lambda _module, _inputs, out: states.append(out)))
    states.append(model(latent, timestep, caption))
    for hook in hooks:
        hook.remove()
    return states


@pytest.fixture(scope="module")
def drawn():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 32, generator=generator)


@torch.no_grad()
def test_every_block_is_the_dits_at_500(drawn):
    dit, (latent, caption) = make_dit(), drawn
    state, config = start_from_dit(dit.state_dict(), **SIZES)
    assert (config.base_size, config.pe_scale, config.num_heads) == (4, 1.0, 1)
    timestep = torch.full((2,), 500.0)
    expected = dit.states(latent, timestep, torch.full((2,), NONE))
    for own, theirs in zip(states_of(model_of(state, config), latent, timestep, caption), expected, strict=True):
        assert_equal_to_rounding(own, theirs, 32)  # float32 through three blocks


@torch.no_grad()
def test_another_class_or_time_is_another_picture(drawn):
    dit, (latent, caption) = make_dit(), drawn
    model, timestep = model_of(*start_from_dit(dit.state_dict(), **SIZES)), torch.full((2,), 500.0)
    other_class = dit.states(latent, timestep, torch.zeros(2, dtype=torch.long))[-1]
    assert (model(latent, timestep, caption) - other_class).abs().max() > 0.01
    later = torch.full((2,), 800.0)
    drift = (model(latent, later, caption) - dit.states(latent, later, torch.full((2,), NONE))[-1]).abs().mean()
    still = (model(latent, timestep, caption) - model(latent, later, caption)).abs().mean()
    assert 0 < drift < 3 * still  # the mean of all modulations follows time, though not each block's own


def write_original(path, dit):
    torch.save(dit.state_dict(), path)


def write_training(path, dit):
    other = make_dit(seed=9).state_dict()
    torch.save({"model": other, "ema": dit.state_dict(), "opt": {"state": {}, "param_groups": []}}, path)


def write_bare(path, dit):
    save_file({name: tensor.contiguous() for name, tensor in dit.state_dict().items()}, path)


@pytest.mark.parametrize("write", [write_original, write_training, write_bare])
def test_files_of_the_original(tmp_path, write):
    dit, path = make_dit(), tmp_path / ("dit.safetensors" if write is write_bare else "DiT-S.pt")
    write(path, dit)
    checkpoint = read_dit(path, **SIZES)
    expected, config = start_from_dit(dit.state_dict(), **SIZES)
    assert checkpoint.config == config
    assert read_stages(checkpoint.metadata) == (f"started from {path.name}",)
    for name, tensor in checkpoint.state_dict.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def diffusers_dit():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(1)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    for block in model.transformer_blocks:
        # diffusers spaces the frequencies of this one model's timesteps otherwise than DiT, whose weights it publishes
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.emb.class_embedder.embedding_table.weight.data.normal_(std=0.1)
        block.norm1.linear.weight.data.normal_(std=0.1)
    return model.eval().requires_grad_(False)


@pytest.mark.peer
@torch.no_grad()
def test_folder_of_diffusers(tmp_path, diffusers_dit, drawn):
    diffusers_dit.save_pretrained(tmp_path / "DiT" / "transformer")
    checkpoint = read_dit(tmp_path / "DiT", **SIZES)
    assert (checkpoint.config.num_heads, checkpoint.config.base_size) == (2, 4)
    latent, caption = drawn
    own = model_of(checkpoint.state_dict, checkpoint.config)(latent, torch.full((2,), 500.0), caption)
    labels = torch.full((2,), NONE)
    theirs = diffusers_dit(latent, timestep=torch.tensor([500, 500]), class_labels=labels).sample
    # Its blocks have an epsilon of 1e-5 in their norms, and DiT's 1e-6, of variances near 0.1.
    torch.testing.assert_close(own, theirs, rtol=0, atol=3e-4)


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


DAMAGES = {
    "final_layer.linear.weight": lambda state: without(state, "final_layer.linear.weight"),
    "blocks.1.attn.proj.bias": lambda state: {**state, "blocks.1.attn.proj.bias": torch.zeros(3)},
    "blocks.0.attn.lora": lambda state: {**state, "blocks.0.attn.lora": torch.zeros(3)},
    "a table that is not the sines": lambda state: {**state, "pos_embed": torch.randn(1, 16, 48)},
    "Not a DiT": lambda state: without(state, "y_embedder.embedding_table.weight"),
}


@pytest.mark.parametrize("named", DAMAGES)
def test_bad_files_are_refused_by_name(tmp_path, named):
    torch.save(DAMAGES[named](make_dit().state_dict()), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt") as caught:
        read_dit(tmp_path / "bad.pt", **SIZES)
    assert named in str(caught.value) or json.dumps(named) in str(caught.value)


def test_a_pixart_needs_no_start(tmp_path):
    from pixart_pack.tests.tiny_pixart import make_weights, tiny_config

    torch.save(make_weights(tiny_config()), tmp_path / "pixart.pth")
    with pytest.raises(ValueError, match="a PixArt needs no such start"):
        read_dit(tmp_path / "pixart.pth")
