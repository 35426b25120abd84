"""The edge node in this process: methods, sizes, files, chunks."""

import importlib
import os

import pytest
import torch
from safetensors.torch import save_file

from pixart_pack.pixart.encoders.edges import canny_edges, soft_edges
from pixart_pack.pixart.encoders.hed import detect_edges, make_hed
from pixart_pack.tests.goldens import load_golden, take

NODE = "PixArtHEDPreprocessor"


@pytest.fixture(scope="module")
def weights():
    return take(load_golden("hed_narrow")[1], "weights")


@pytest.fixture
def folders(comfy, pack, tmp_path, monkeypatch):
    """Empty folders in place of models/annotators and models/controlnet."""
    paths = importlib.import_module("folder_paths")
    roots = {name: tmp_path / name for name in ("annotators", "controlnet")}
    for name, root in roots.items():
        root.mkdir()
        monkeypatch.setitem(paths.folder_names_and_paths, name, ([str(root)], paths.folder_names_and_paths[name][1]))
    monkeypatch.setattr(paths, "filename_list_cache", {})
    return {name: str(root) for name, root in roots.items()}


@pytest.fixture
def hed_file(folders, weights):
    torch.save(weights, os.path.join(folders["annotators"], "ControlNetHED.pth"))


def pictures(count=1, height=40, width=56, channels=3):
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(0))


def test_hed_is_the_network(run_node, hed_file, weights):
    image = pictures(2)
    edges, width, height = run_node(NODE, image=image, method="hed")
    expected = detect_edges(make_hed(weights, ""), image.movedim(-1, 1))
    assert edges.shape == (2, 40, 56, 3) and (width, height) == (56, 40) and edges.is_contiguous()
    torch.testing.assert_close(edges, expected.movedim(1, -1).expand(-1, -1, -1, 3), atol=1e-6, rtol=0)


def test_strength_multiplies_and_stays_in_range(run_node, hed_file):
    full, *_ = run_node(NODE, image=pictures(), method="hed")
    half, *_ = run_node(NODE, image=pictures(), method="hed", strength=0.5)
    twice, *_ = run_node(NODE, image=pictures(), method="hed", strength=2.0)
    torch.testing.assert_close(half, full * 0.5)
    torch.testing.assert_close(twice, (full * 2).clamp(max=1))


@pytest.mark.parametrize(("method", "function"), [("soft edges", soft_edges), ("canny", canny_edges)])
def test_no_file_is_needed(run_node, folders, method, function):
    image = pictures()
    edges, *_ = run_node(NODE, image=image, method=method)
    torch.testing.assert_close(edges[..., 0], function(image.movedim(-1, 1))[:, 0], atol=1e-6, rtol=0)


def test_thresholds_are_cannys(run_node):
    image = pictures()
    some, *_ = run_node(NODE, image=image, method="canny")
    more, *_ = run_node(NODE, image=image, method="canny", low_threshold=0.01, high_threshold=0.05)
    assert more.sum() > some.sum()
    with pytest.raises(ValueError, match="Thresholds out of order: got 0.9 and 0.8"):
        run_node(NODE, image=image, method="canny", low_threshold=0.9)


def test_fit_into_a_bin(run_node):
    edges, width, height = run_node(NODE, image=pictures(height=300, width=420), method="soft edges", fit="256")
    assert edges.shape == (1, 208, 288, 3) and (width, height) == (288, 208)


def test_chunks_do_not_show(run_node, monkeypatch, hed_file):
    adapter = importlib.import_module("pixart_pack.nodes.host.edges")
    together, *_ = run_node(NODE, image=pictures(5), method="hed")
    monkeypatch.setattr(adapter, "_CHUNK_PIXELS", 2 * 40 * 56 + 1)
    apart, *_ = run_node(NODE, image=pictures(5), method="hed")
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=0)  # convolutions sum in another order


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(run_node, channels):
    image = pictures(channels=channels)
    edges, *_ = run_node(NODE, image=image, method="soft edges")
    colours = image[..., :3].expand(-1, -1, -1, 3)
    expected, *_ = run_node(NODE, image=colours, method="soft edges")
    assert torch.equal(edges, expected)


def test_missing_file(run_node, folders):
    open(os.path.join(folders["controlnet"], "control_v11p_sd15_hed.pth"), "wb").close()
    with pytest.raises(FileNotFoundError, match="HED file not found: got none in models/annotators .*ControlNetHED"):
        run_node(NODE, image=pictures(), method="hed")
    with pytest.raises(FileNotFoundError, match=r"File not found: got '../secret.pth'"):
        run_node(NODE, image=pictures(), method="hed", hed_model="../secret.pth")


def test_another_file(run_node, folders):
    save_file({"lllite.weight": torch.zeros(1)}, os.path.join(folders["controlnet"], "lllite.safetensors"))
    with pytest.raises(ValueError, match="Not the HED edge detector: got lllite.weight in 'lllite.safetensors'"):
        run_node(NODE, image=pictures(), method="hed", hed_model="lllite.safetensors")


def test_a_replaced_file_is_read_again(run_node, folders, weights):
    path = os.path.join(folders["controlnet"], "hed.safetensors")
    save_file(weights, path)
    before, *_ = run_node(NODE, image=pictures(), method="hed")
    save_file({**weights, "norm": weights["norm"] + 50}, path)
    os.utime(path, ns=(0, 10**18))
    after, *_ = run_node(NODE, image=pictures(), method="hed")
    assert not torch.equal(before, after)


def test_the_list_starts_with_what_fits(folders, pack):
    for folder, name in (("controlnet", "aaa.safetensors"), ("controlnet", "ControlNetHED.pth")):
        open(os.path.join(folders[folder], name), "wb").close()
    names = importlib.import_module("pixart_pack.nodes.host.edges").list_hed_models()
    assert names == ["auto", "ControlNetHED.pth", "aaa.safetensors"]
