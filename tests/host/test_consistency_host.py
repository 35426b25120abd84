"""The consistency decoder as the host's VAE: in this process and through the queue."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from pixart_pack.tests.host.graph import VAE, Graph
from pixart_pack.tests.rounding import assert_equal_to_rounding
from pixart_pack.tests.tiny_consistency import write_consistency_decoder
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config

NODE = "PixArtLoadConsistencyDecoder"
NAME = "consistency-decoder/"
DEMO = Path(__file__).parent.parent.parent / "demo" / "models" / "vae"


@pytest.fixture(scope="module")
def network(comfy):
    paths = importlib.import_module("folder_paths")
    return write_consistency_decoder(Path(paths.get_folder_paths("vae")[0], NAME))


@pytest.fixture(scope="module")
def vae(comfy, pack):
    sd = importlib.import_module("comfy.sd")
    weights, metadata = importlib.import_module("comfy.utils").load_torch_file(str(DEMO / VAE), return_metadata=True)
    return sd.VAE(sd=weights, metadata=metadata, dtype=torch.float32)


@pytest.fixture
def latents():
    return torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(3)) * 4


@torch.inference_mode()
def test_decode_is_diffusers_own(network, vae, latents, run_node):
    ours = run_node(NODE, decoder=NAME, vae=vae, seed=5)[0]
    pictures = ours.decode(latents)
    assert pictures.shape == (2, 72, 56, 3)
    for latent, picture in zip(latents, pictures, strict=True):
        expected = network.decode(latent[None], generator=torch.Generator().manual_seed(5)).sample[0]
        torch.testing.assert_close(picture, ((expected + 1) / 2).clamp(0, 1).movedim(0, -1), rtol=0, atol=1e-6)
    assert vae.decode(latents).shape == (2, 72, 56, 3)  # the normal VAE is as it was
    assert not torch.equal(vae.decode(latents), pictures)


@torch.inference_mode()
def test_it_encodes_as_the_normal_vae_and_decodes_in_tiles(network, vae, latents, run_node):
    ours = run_node(NODE, decoder=NAME, vae=vae)[0]
    image = torch.rand(1, 40, 56, 3)
    assert_equal_to_rounding(ours.encode(image), vae.encode(image), units=64)
    tiles = {"tile_x": 32, "tile_y": 32, "overlap": 8}
    assert_equal_to_rounding(ours.encode_tiled(image, **tiles), vae.encode_tiled(image, **tiles), units=64)
    tiled = ours.decode_tiled(latents, tile_x=6, tile_y=6, overlap=2)
    assert tiled.shape == (2, 72, 56, 3) and 0 <= tiled.min() and tiled.max() <= 1
    large = ours.memory_used_decode((1, 4, 128, 128), torch.bfloat16)
    assert large > vae.memory_used_decode((1, 4, 128, 128), torch.bfloat16) / 20  # of 16 channels here, of 320 there
    assert ours.patcher.model_size() > 0


def test_what_does_not_suit_is_refused(network, vae, run_node):
    from pixart_pack.nodes.host.denoiser.model import make_patcher

    config = tiny_config(caption_length=300, vae_scale=0.13025)
    sigma = make_patcher(make_weights(config), config)
    with pytest.raises(ValueError, match="Decoder of another family"):
        run_node(NODE, decoder=NAME, vae=vae, model=sigma)
    with pytest.raises(FileNotFoundError, match="Folder not found: got '../x/'"):
        run_node(NODE, decoder="../x/", vae=vae)


def test_through_the_queue(host, network):
    write_consistency_decoder(host.models / "vae" / NAME)
    graph = Graph()
    vae = graph.add("VAELoader", vae_name=VAE)
    decoder = graph.add(NODE, decoder=NAME, vae=vae, seed=9)
    image = graph.add("EmptyImage", width=72, height=40, batch_size=2, color=0x336699)
    latent = graph.add("VAEEncode", pixels=image, vae=decoder)
    for kind, tiles in (
        ("VAEDecode", {}),
        ("VAEDecodeTiled", {"tile_size": 64, "overlap": 0, "temporal_size": 64, "temporal_overlap": 8}),
    ):
        picture = graph.add(kind, samples=latent, vae=decoder, **tiles)
        graph.add("SaveImage", images=picture, filename_prefix=kind)
    pictures = [np.asarray(each, np.float32) for each in host.run(graph.nodes, timeout_s=300)]
    assert [each.shape for each in pictures] == [(40, 72, 3)] * 4
    # of 255: the normal VAE's rows of a batch differ in rounding, which can tip a value over to the next
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
