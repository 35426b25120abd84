"""What lies around a diffusers transformer decides what it is, and what diffusers writes back keeps its family."""

import dataclasses
import json

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file

from pixart_pack.pixart import CONFIGS
from pixart_pack.pixart.checkpoint import detect_config, expected_shapes, explain_detection, to_diffusers
from pixart_pack.pixart.weights.reading import read_checkpoint
from pixart_pack.pixart.weights.saving import diffusers_config, save_checkpoint

pytestmark = pytest.mark.peer

TINY = {"depth": 1, "hidden_size": 24, "num_heads": 2, "caption_channels": 16}
FILE = "diffusion_pytorch_model.safetensors"


def tiny(variant, **fields):
    return dataclasses.replace(CONFIGS[variant], **{**TINY, **fields})


def random_weights(config):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(config).items()}


def write_folder(folder, config, **changes):
    """A transformer folder without anything of ours in it."""
    folder.mkdir(parents=True)
    save_file(to_diffusers(random_weights(config)), folder / FILE)
    (folder / "config.json").write_text(json.dumps(diffusers_config(config) | changes))
    return folder


@pytest.mark.parametrize("variant", CONFIGS)
def test_what_diffusers_saves_again_is_the_same_model(tmp_path, variant):
    config = tiny(variant)
    save_checkpoint(tmp_path / "ours", random_weights(config), config)
    network = PixArtTransformer2DModel.from_pretrained(tmp_path / "ours" / "transformer")
    network.save_pretrained(tmp_path / "theirs" / "transformer")
    for path in (tmp_path / "theirs", tmp_path / "theirs" / "transformer" / FILE):
        assert read_checkpoint(path).config == config
    ours, theirs = (read_checkpoint(tmp_path / name).state_dict for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    (tmp_path / "theirs").rename(tmp_path / "my-model")
    (tmp_path / "ours" / "model_index.json").unlink(missing_ok=True)
    for name in ("my-model", "ours"):
        assert read_checkpoint(tmp_path / name).config == config
    other = tmp_path / "ours" / "vae" / "config.json"
    other.parent.mkdir()
    scale = 0.18215 if config.vae_scale == 0.13025 else 0.13025  # that of the other family
    other.write_text(json.dumps({"_class_name": "AutoencoderKL", "scaling_factor": scale}))
    assert read_checkpoint(tmp_path / "ours").config == config  # what we wrote says more


def test_a_config_without_explicit_conditions_is_alpha(tmp_path):
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
        sample_size=64, use_additional_conditions=False,
    )  # fmt: skip
    network.save_pretrained(tmp_path / "transformer")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.detection.variant == "alpha-512"
    assert any("PixArt-alpha" in remark and "variant" in remark for remark in checkpoint.remarks)


BESIDE = {
    "model_index.json": {"_class_name": "PixArtSigmaPipeline"},
    "vae/config.json": {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025},
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_around_counts_before_the_common_case(tmp_path, name):
    write_folder(tmp_path / "x" / "transformer", tiny("alpha-512"))
    path = tmp_path / "x" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(BESIDE[name]))
    checkpoint = read_checkpoint(tmp_path / "x")
    assert checkpoint.config == tiny("sigma-512") and not checkpoint.remarks


def test_a_sign_that_is_overruled_is_said(tmp_path):
    write_folder(tmp_path / "PixArt-XL-2-512x512" / "transformer", tiny("alpha-512"))
    vae = tmp_path / "PixArt-XL-2-512x512" / "vae" / "config.json"
    vae.parent.mkdir()
    vae.write_text(json.dumps(BESIDE["vae/config.json"]))  # Sigma's
    (remark,) = read_checkpoint(tmp_path / "PixArt-XL-2-512x512").remarks
    assert remark.startswith("taken for sigma, but") and "alpha" in remark and "Choose the variant" in remark


def test_the_name_of_the_folder_counts_before_the_common_case(tmp_path):
    folder = write_folder(tmp_path / "PixArt-Sigma-XL-2-512-MS" / "transformer", tiny("alpha-512"))
    assert read_checkpoint(folder / FILE).config == tiny("sigma-512")


def test_an_early_autoencoder_without_a_scale_is_that_of_alpha():
    weights = to_diffusers(random_weights(tiny("sigma-1024")))
    detection = explain_detection(weights, vae_config={"_class_name": "AutoencoderKL"})
    assert (detection.family, detection.config.vae_scale) == ("alpha", 0.18215)


def test_a_file_of_a_folder_is_the_model_of_the_folder(tmp_path):
    config = tiny("alpha-256", num_heads=3, pe_scale=0.75)
    folder = write_folder(tmp_path / "transformer", config)
    assert read_checkpoint(folder / FILE).config == config
    (folder / FILE).rename(folder / "mine.safetensors")  # under another name it may be any file
    assert read_checkpoint(folder / "mine.safetensors", num_heads=3, pe_scale=0.75).config.base_px != config.base_px


def test_a_shard_stands_for_all_of_them(tmp_path):
    config = tiny("sigma-512")
    save_checkpoint(tmp_path, random_weights(config), config, shard_bytes=20_000)
    shards = sorted((tmp_path / "transformer").glob("*-of-*"))
    assert len(shards) > 2
    checkpoint = read_checkpoint(shards[1])
    assert checkpoint.config == config and len(checkpoint.state_dict) == len(read_checkpoint(tmp_path).state_dict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 28}, "num_layers 28, expected 1"),
        ({"attention_head_dim": 10**9}, "num_attention_heads.*expected 24"),
        ({"num_attention_heads": -4}, "num_attention_heads.*expected 24"),
        ({"caption_channels": 4096}, "caption_channels 4096, expected 16"),
        ({"sample_size": 10**8}, "sample_size 100000000, expected a latent's side"),
        ({"patch_size": 4.5}, "patch_size 4.5, expected 2"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, changes, message):
    folder = write_folder(tmp_path / "transformer", tiny("alpha-512"), **changes)
    for path in (tmp_path, folder / FILE):
        with pytest.raises(ValueError, match=f"disagree: got {message}"):
            read_checkpoint(path)


def test_what_is_not_honoured_is_named(tmp_path):
    write_folder(
        tmp_path / "PixArt-XL-2-512x512" / "transformer", tiny("alpha-512"), norm_eps=1e-5, activation_fn="gelu"
    )
    remarks = read_checkpoint(tmp_path / "PixArt-XL-2-512x512").remarks
    assert len(remarks) == 2 and "activation_fn 'gelu'" in remarks[0] and "norm_eps 1e-05" in remarks[1]


def test_another_activation_is_refused(tmp_path):
    write_folder(tmp_path / "transformer", tiny("alpha-512"), activation_fn="silu")
    with pytest.raises(ValueError, match="activation_fn 'silu', expected 'gelu-approximate'"):
        read_checkpoint(tmp_path)
    assert detect_config(random_weights(tiny("alpha-512")), num_heads=2) == tiny("alpha-512")
