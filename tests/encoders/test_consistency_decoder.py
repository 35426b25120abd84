"""The consistency decoder computes what diffusers' own class computes."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from pixart_pack.pixart.encoders.consistency_decoder import decode, load_consistency_decoder, memory_bytes
from pixart_pack.tests.rounding import assert_equal_to_rounding
from pixart_pack.tests.tiny_consistency import write_consistency_decoder

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    return folder, write_consistency_decoder(folder)


@torch.no_grad()
def test_parity_in_any_batch_at_odd_sizes(saved):
    folder, network = saved
    latents = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(1)) * 5
    ours = decode(load_consistency_decoder(folder), latents, seed=11)
    assert ours.shape == (3, 3, 40, 56)
    for latent, picture in zip(latents, ours, strict=True):
        expected = network.decode(latent[None], generator=torch.Generator().manual_seed(11)).sample[0]
        # Weights mapped from a file lie otherwise than made ones; two kinds of kernels were measured 6 units apart.
        assert_equal_to_rounding(picture, expected, units=64)
    assert not torch.equal(decode(network, latents[:1], seed=12), ours[:1])


@pytest.mark.slow
def test_a_file_alone_and_with_its_configuration(saved, tmp_path):
    folder, network = saved
    file = tmp_path / "decoder.safetensors"
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", file)
    with pytest.raises(ValueError, match="Not a consistency decoder: got Missing key.{,150} in 'decoder.safetensors'"):
        load_consistency_decoder(file)  # of the published sizes, unless a configuration says others
    shutil.copy(folder / "config.json", tmp_path)
    loaded = load_consistency_decoder(file, torch.bfloat16)
    assert next(loaded.parameters()).dtype == loaded.means.dtype == torch.bfloat16
    assert not hasattr(loaded, "encoder")
    latents = torch.randn(1, 4, 3, 4, generator=torch.Generator().manual_seed(2))
    half = decode(loaded, latents.bfloat16(), seed=1)
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_other_weights_are_told(tmp_path):
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(1)}, tmp_path / "pixart.safetensors")
    with pytest.raises(ValueError, match="Not a consistency decoder: got 1 tensors such as blocks.0.attn.qkv.weight"):
        load_consistency_decoder(tmp_path / "pixart.safetensors")
    with pytest.raises(ValueError, match="got a folder of something else"):
        load_consistency_decoder(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_consistency_decoder(tmp_path / "absent.safetensors")


def test_the_memory_goes_by_pixels_and_precision(saved):
    network = load_consistency_decoder(saved[0])
    one = memory_bytes(network, 8, 8, torch.float32)
    assert memory_bytes(network, 16, 8, torch.float32) == 2 * one == 4 * memory_bytes(network, 8, 8, torch.bfloat16)
    assert one > 64 * 64 * 16 * 15 * 4
