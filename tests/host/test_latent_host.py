"""The size nodes in a real ComfyUI."""

import importlib

import pytest
import torch

from pixart_pack.pixart.resolution import ASPECT_RATIOS


@pytest.fixture(scope="module")
def nodes(comfy):
    return importlib.import_module("pixart_pack.nodes.latent")


def run(node, *arguments, **inputs):
    with torch.inference_mode():
        return node.execute(*arguments, **inputs)


def test_by_ratio(nodes):
    for base in nodes.BASES:
        for label, ratio in nodes.RATIOS.items():
            width, height, latent, nominal = run(nodes.Resolution, base, "by ratio", ratio=label, batch_size=2)
            assert (height, width) == ASPECT_RATIOS[int(base)][ratio] and nominal == ratio
            assert latent["samples"].shape == (2, 4, height // 8, width // 8)


def test_labels_name_the_ratio(nodes):
    assert nodes.SQUARE == "1.0 (1:1)"
    assert nodes.RATIOS["0.57 (7:4)"] == 0.57


def test_nearest(nodes):
    assert run(nodes.Resolution, "1024", "nearest to size", width=1920, height=1080).args[:2] == (1344, 768)
    image = torch.zeros(1, 600, 800, 3)
    width, height, _, ratio = run(nodes.Resolution, "512", "nearest to image", image=image).args
    assert (width, height, ratio) == (576, 416, 0.72)
    with pytest.raises(ValueError, match="Not connected: got no image"):
        run(nodes.Resolution, "512", "nearest to image")
    with pytest.raises(ValueError, match="Picture size out of range"):
        run(nodes.Resolution, "512", "nearest to size", width=0)


def test_the_latent_is_the_hosts(nodes, core_nodes):
    ours = run(nodes.Resolution, "256", "by ratio", batch_size=3)[2]
    (core,) = core_nodes["EmptyLatentImage"]().generate(256, 256, 3)
    assert ours.keys() == core.keys() and ours["downscale_ratio_spacial"] == core["downscale_ratio_spacial"]
    assert ours["samples"].dtype == core["samples"].dtype and torch.equal(ours["samples"], core["samples"])


def gradient(height, width):
    rows, columns = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
    return torch.stack([rows[:, None].expand(-1, width), columns.expand(height, -1), torch.ones(height, width)], -1)[
        None
    ]


@pytest.mark.parametrize("method", ["bicubic", "lanczos", "bilinear"])
def test_fit_and_back(nodes, method):
    image = gradient(300, 420)
    before = image.clone()
    fitted, width, height, old_width, old_height = run(
        nodes.FitImage, image, "into the nearest bin", base="256", method=method
    )
    assert fitted.shape == (1, height, width, 3) and (height, width) == (208, 288)
    assert (old_width, old_height) == (420, 300) and torch.equal(image, before)
    assert fitted.min() >= 0 and fitted.max() <= 1
    back, *_ = run(nodes.FitImage, fitted, "to a size", width=old_width, height=old_height, method=method)
    assert back.shape == image.shape
    assert (back - image).abs().mean() < 0.01  # one row or column is cut on the way


def test_methods_agree_with_pillow(nodes):
    """Resizing only, by half: the host's own lanczos goes through 8 bits and cuts overshoot, ours does not."""
    utils = importlib.import_module("comfy.utils")
    image = 0.3 + 0.4 * torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    host = utils.lanczos(image.movedim(-1, 1), 48, 32).movedim(1, -1)
    lanczos, *_ = run(nodes.FitImage, image, "to a size", width=48, height=32, method="lanczos")
    torch.testing.assert_close(lanczos, host, atol=2 / 255, rtol=0)
    bicubic, *_ = run(nodes.FitImage, image, "to a size", width=48, height=32, method="bicubic")
    assert 0 < (lanczos - bicubic).abs().mean() < 0.05


def test_fit_needs_a_size(nodes):
    with pytest.raises(ValueError, match="got 0x64, expected a width and height"):
        run(nodes.FitImage, torch.zeros(1, 8, 8, 3), "to a size", height=64)
