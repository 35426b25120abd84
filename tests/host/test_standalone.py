"""T5 and autoencoders outside ComfyUI."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_pack.pixart.encoders.autoencoder import KL_CONFIG, load_autoencoder
from pixart_pack.pixart.encoders.t5 import load_text_encoder, read_network
from pixart_pack.tests.rounding import assert_equal_to_rounding
from pixart_pack.tests.tiny_t5 import SIZES, make_t5, weights_of

UNITS = 512  # two kinds of kernels were measured 119 units apart, in the autoencoder's pictures
TINY_KL = {**KL_CONFIG, "block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}


@pytest.fixture
def t5_file(tmp_path):
    save_file(weights_of(make_t5()), tmp_path / "t5.safetensors")
    return tmp_path / "t5.safetensors"


def test_captions_equal_transformers_padded_run_under_its_mask(t5_file, comfyui):
    encoder = load_text_encoder(t5_file, comfyui / "comfy" / "text_encoders" / "t5_tokenizer")
    captions = ["a large red circle in the top left", ""]
    states = encoder(captions, 120)
    assert [tuple(state.shape) for state in states] == [(len(encoder(captions[:1], 120)[0]), SIZES["d_model"]), (1, 24)]
    padded = encoder.tokenizer(captions, padding="max_length", max_length=20, return_tensors="pt")
    expected = make_t5()(**padded).last_hidden_state
    for state, row in zip(states, expected, strict=True):
        assert torch.allclose(state, row[: len(state)], atol=1e-5)  # other shapes, other order of sums
    assert len(encoder(["word " * 300], 120)[0]) == 120


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_is_held_once(t5_file, dtype):
    """In another dtype than the file's, too: T5-XXL's takes 251 MiB in fp16."""
    network = read_network(t5_file, dtype)
    shared, own = network.shared.weight, network.encoder.embed_tokens.weight
    assert shared.dtype == dtype and shared.data_ptr() == own.data_ptr()


def test_the_tokenizer_is_found_beside_the_encoder_or_in_comfyui(t5_file, comfyui, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    with pytest.raises(FileNotFoundError, match="No T5 tokenizer: got none beside 't5.safetensors'"):
        load_text_encoder(t5_file)
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    assert load_text_encoder(t5_file)


def test_an_encoder_of_integers_without_a_scale_is_refused_by_name(t5_file, tmp_path):
    weights = load_file(t5_file)
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, tmp_path / "int8.safetensors")
    with pytest.raises(ValueError, match="Integer weights without a scale: got torch.int8 for 'encoder.block.0.*int8"):
        load_text_encoder(tmp_path / "int8.safetensors")


def test_an_autoencoder_from_its_folder_and_its_file(tmp_path, monkeypatch):
    torch.manual_seed(0)
    expected = diffusers.AutoencoderKL.from_config(TINY_KL).eval()
    expected.save_pretrained(tmp_path / "vae")
    monkeypatch.setattr("pixart_pack.pixart.encoders.autoencoder.KL_CONFIG", TINY_KL)
    pictures = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        mean = expected.encode(pictures).latent_dist.mean
        for path in (tmp_path / "vae", tmp_path / "vae" / "diffusion_pytorch_model.safetensors"):
            autoencoder = load_autoencoder(path)
            found, deviation = autoencoder.encode(pictures)
            assert deviation.shape == mean.shape
            assert_equal_to_rounding(found, mean, UNITS)
            assert_equal_to_rounding(autoencoder.decode(found), expected.decode(mean).sample, UNITS)


def test_taesds_own_layout_gives_the_same_as_diffusers(tmp_path):
    torch.manual_seed(0)
    expected = diffusers.AutoencoderTiny().eval()
    state = {}
    for name, tensor in expected.state_dict().items():
        part, _, number, rest = name.split(".", 3)
        state[f"taesd_{part}.{int(number) + (part == 'decoder')}.{rest}"] = tensor
    save_file(state, tmp_path / "taesd.safetensors")
    autoencoder = load_autoencoder(tmp_path / "taesd.safetensors")
    pictures = torch.rand(1, 3, 40, 24) * 2 - 1
    with torch.no_grad():
        mean, deviation = autoencoder.encode(pictures)
        assert deviation is None
        assert_equal_to_rounding(mean, expected.encode(pictures).latents, UNITS)
        assert_equal_to_rounding(autoencoder.decode(mean), expected.decode(mean).sample, UNITS)


def test_what_is_no_autoencoder_is_refused_by_name(t5_file, tmp_path):
    with pytest.raises(ValueError, match="Not an autoencoder: got .* in t5.safetensors"):
        load_autoencoder(t5_file)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="Not an autoencoder folder"):
        load_autoencoder(tmp_path)
    save_file({"taesd_decoder.1.weight": torch.zeros(64, 16, 3, 3)}, tmp_path / "taef1.safetensors")
    with pytest.raises(ValueError, match="Not a TAESD of 4 latent channels"):
        load_autoencoder(tmp_path / "taef1.safetensors")
