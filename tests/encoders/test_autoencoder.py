"""Autoencoders of strangers: the same from safetensors and from pickles, of which no program is run."""

import json

import pytest
import torch

from pixart_pack.pixart.encoders.autoencoder import load_autoencoder
from pixart_pack.pixart.text import load_tokenizer

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.peer
TINY = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
NAME = "diffusion_pytorch_model"


class Strange:
    """What a pickle of strangers may hold."""


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(**TINY)
    network.save_pretrained(tmp_path / "vae")
    torch.save(network.state_dict(), tmp_path / f"{NAME}.bin")
    return tmp_path / "vae"


def test_pickles_are_read_by_our_own_reader(folder, tmp_path, monkeypatch):
    latent = torch.randn(1, 4, 4, 4)
    expected = load_autoencoder(folder).decode(latent)
    (folder / f"{NAME}.safetensors").unlink()
    (tmp_path / f"{NAME}.bin").rename(folder / f"{NAME}.bin")

    def load(*_, **__):
        raise AssertionError("torch's own reader of pickles")

    monkeypatch.setattr(torch, "load", load)
    assert torch.equal(load_autoencoder(folder).decode(latent), expected)


def test_a_hostile_pickle_is_refused_without_advice(folder):
    (folder / f"{NAME}.safetensors").unlink()
    torch.save({"a": Strange()}, folder / f"{NAME}.bin")
    with pytest.raises(ValueError, match="Not a whole autoencoder: got [0-9]+ weights too few in 'vae'") as caught:
        load_autoencoder(folder)
    assert "weights_only" not in str(caught.value)


def test_links_out_are_refused(folder, tmp_path):
    (folder / f"{NAME}.safetensors").rename(tmp_path / "other.safetensors")
    (folder / f"{NAME}.safetensors").symlink_to(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="A link leads out of its folder"):
        load_autoencoder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_a_tokenizer_has_no_links_out(tmp_path, name):
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"A link leads out of its folder: got '{name}'"):
        load_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / name).unlink()
    with open(tmp_path / "tokenizer" / name, "wb") as file:
        file.truncate(200 * 10**6)
    with pytest.raises(ValueError, match="File too large: got 200.0 MB"):
        load_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_files_of_a_variant_are_read(folder, shard):
    latent = torch.randn(1, 4, 4, 4)
    expected = load_autoencoder(folder).decode(latent)
    network = diffusers.AutoencoderKL.from_pretrained(folder)
    (folder / f"{NAME}.safetensors").unlink()
    network.save_pretrained(folder, variant="fp16", max_shard_size=shard)
    assert torch.equal(load_autoencoder(folder).decode(latent), expected)


@pytest.mark.parametrize("changes", [{"block_out_channels": [8, 10**9]}, {"layers_per_block": 10**9}])
def test_sizes_without_measure_are_refused_before_anything_is_made(folder, changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match="Oversized autoencoder: got"):
        load_autoencoder(folder)
