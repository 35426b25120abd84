"""Edge pictures through the queue of a real server."""

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_pack.demo.client import Interrupted, PromptError
from pixart_pack.pixart.encoders.edges import soft_edges
from pixart_pack.tests.goldens import load_golden, take
from pixart_pack.tests.host.graph import Graph


@pytest.fixture(scope="module")
def hed_file(start_host):
    """A narrow HED in the server's models/annotators, a folder that only the pack knows."""
    folder = start_host().models / "annotators"
    folder.mkdir(exist_ok=True)
    torch.save(take(load_golden("hed_narrow")[1], "weights"), folder / "ControlNetHED.pth")
    return "ControlNetHED.pth"


@pytest.fixture(scope="module")
def picture(start_host):
    rows, columns = np.mgrid[0:75, 0:101]
    disc = (rows - 37) ** 2 + (columns - 50) ** 2 < 900
    pixels = np.where(disc[..., None], (225, 30, 35), (245, 245, 245)).astype(np.uint8)
    return start_host().upload(Image.fromarray(pixels), "edges_disc.png"), pixels


def edge_graph(picture, batch=1, **inputs):
    graph = Graph()
    image = graph.add("LoadImage", image=picture[0])
    if batch > 1:
        image = graph.add("RepeatImageBatch", image=image, amount=batch)
    edges = graph.add("PixArtHEDPreprocessor", image=image, **inputs)
    graph.add("SaveImage", images=edges, filename_prefix="edges")
    return graph.nodes


def test_soft_edges(host, picture):
    (saved,) = host.run(edge_graph(picture, method="soft edges"), timeout_s=120)
    pixels = torch.from_numpy(picture[1]).float().movedim(-1, 0)[None] / 255
    expected = soft_edges(pixels)[0, 0].numpy() * 255
    got = np.asarray(saved.convert("RGB")).astype(float)
    assert got.shape == (75, 101, 3) and (got[..., 0] == got[..., 2]).all()
    assert np.abs(got[..., 0] - expected).max() <= 1  # Save Image rounds down


def test_hed_and_canny_of_a_batch(host, picture, hed_file):
    for method in ("hed", "canny"):
        saved = host.run(edge_graph(picture, 3, method=method, hed_model=hed_file, fit="256"), timeout_s=120)
        assert [image.size for image in saved] == [(288, 208)] * 3
        assert len({image.tobytes() for image in saved}) == 1 and len(np.unique(np.asarray(saved[0]))) > 1


def test_progress_and_interrupt(host, picture, hed_file):
    seen = []

    def interrupt(kind, data):
        if kind == "progress" and not seen:
            seen.append(data["max"])
            host.interrupt()

    with pytest.raises(Interrupted):
        host.wait(host.queue(edge_graph(picture, 400, method="hed", fit="512")), 120, interrupt)
    assert seen == [400]
    assert len(host.run(edge_graph(picture, method="hed"), timeout_s=120)) == 1


def test_wrong_files_end_the_prompt_with_what_to_do(host, picture):
    (host.models / "controlnet" / "nothing.pth").write_bytes(b"<html>")
    try:
        with pytest.raises(PromptError, match="PixArtHEDPreprocessor failed: ValueError: .*nothing.pth"):
            host.run(edge_graph(picture, method="hed", hed_model="nothing.pth"), timeout_s=60)
    finally:
        (host.models / "controlnet" / "nothing.pth").unlink()
