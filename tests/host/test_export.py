"""Saving a MODEL: what is on it goes with it, in every layout."""

import pytest
import torch

from pixart_pack.pixart.config import PixArtConfig
from pixart_pack.pixart.weights.reading import read_checkpoint
from pixart_pack.tests.host.graph import write_lora, write_pixart
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config

CONFIG: PixArtConfig = tiny_config()


@pytest.fixture
def folder(comfy, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    paths = {"diffusion_models": tmp_path / "models", "loras": tmp_path / "loras"}
    for kind, path in paths.items():
        path.mkdir()
        old = folder_paths.folder_names_and_paths[kind]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(path)], old[1]))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def load(run_node, path, dtype="fp32"):
    write_pixart(path, CONFIG)
    return run_node("PixArtLoadCheckpoint", checkpoint=path.name, weight_dtype=dtype)[0]


@pytest.mark.parametrize(
    "layout", ["original (.safetensors)", "original (.pth)", "diffusers (.safetensors)", "diffusers (folder)"]
)
def test_the_weights_come_back_with_a_lora_in_them(folder, run_node, layout):
    model = load(run_node, folder / "models" / "save.safetensors")
    write_lora(folder / "loras" / "save_lora.safetensors", CONFIG, "base_model.model.")
    patched, _ = run_node("PixArtLoadLoRA", model=model, lora="save_lora.safetensors", strength=0.7)
    path = run_node("PixArtSaveCheckpoint", model=patched, filename_prefix="x/merged", layout=layout, dtype="fp32")[0]
    assert path.startswith("output/x/merged_00001_")
    saved, original = read_checkpoint(folder / path), make_weights(CONFIG)
    assert saved.config == CONFIG
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(saved.state_dict[name], original[name])
    assert torch.equal(saved.state_dict["blocks.0.mlp.fc1.weight"], original["blocks.0.mlp.fc1.weight"])
    assert saved.has_null_caption == ("folder" not in layout)
    again = run_node("PixArtSaveCheckpoint", model=patched, filename_prefix="x/merged", layout=layout)[0]
    assert again != path


def test_fp8_weights_are_saved_in_16_bits(folder, run_node):
    model = load(run_node, folder / "models" / "save8.safetensors", "fp8_e4m3fn")
    path = run_node("PixArtSaveCheckpoint", model=model, filename_prefix="m", layout="original (.safetensors)")[0]
    assert {tensor.dtype for tensor in read_checkpoint(folder / path).state_dict.values()} == {torch.float16}


def test_a_name_never_leads_out_of_the_output_folder(folder, run_node):
    model = load(run_node, folder / "models" / "save.safetensors")
    with pytest.raises(ValueError, match=r"Unusable file name: got '\.\./x'"):
        run_node("PixArtSaveCheckpoint", model=model, filename_prefix="../x", layout="original (.pth)")


@pytest.fixture
def vaes(comfy, tmp_path, monkeypatch):
    """The host's folder of autoencoders, empty."""
    import folder_paths

    path = tmp_path / "vae"
    path.mkdir()
    old = folder_paths.folder_names_and_paths["vae"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae", ([str(path)], old[1]))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return path


def test_a_vae_of_other_channels_is_refused_with_the_model_and_told_without(folder, vaes, run_node):
    from diffusers import AutoencoderKL, AutoencoderTiny

    AutoencoderKL(latent_channels=16, norm_num_groups=32, scaling_factor=0.18215).save_pretrained(vaes / "flux")
    AutoencoderTiny(latent_channels=16).save_pretrained(vaes / "taesd")
    model = load(run_node, folder / "models" / "save.safetensors")
    for name in ("flux", "taesd"):
        with pytest.raises(ValueError, match=f"got 16 latent channels in '{name}', expected 4"):
            run_node("PixArtLoadVAE", vae=f"{name}/", model=model)
    from pixart_pack.nodes.host.loading import load_vae

    assert "16 latent channels" in load_vae("taesd/")[1]


def test_a_tiny_autoencoder_of_diffusers_draws_as_diffusers_does(folder, vaes, run_node):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    network = AutoencoderTiny().eval()
    for name in ("taesd", "taesdxl", "mine"):
        network.save_pretrained(vaes / name)
    model = load(run_node, folder / "models" / "save.safetensors")
    latent = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = (network.decode(latent).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    for name, given in (("taesd/", {}), ("taesd/", {"model": model}), ("mine/", {"model": model})):
        vae = run_node("PixArtLoadVAE", vae=name, **given)[0]
        with torch.inference_mode():
            picture = vae.decode(latent / 0.18215)
        torch.testing.assert_close(picture, expected, atol=2e-2, rtol=0)  # the host's bf16
    with pytest.raises(ValueError, match="latent scale 0.13025"):
        run_node("PixArtLoadVAE", vae="taesdxl/", model=model)
    with pytest.raises(ValueError, match="Connect the model"):
        run_node("PixArtLoadVAE", vae="mine/")
