"""The dataset nodes with the host's own, through the prompt queue of a real server; the demo's T5 and VAE."""

import shutil

import numpy as np
import pytest
from PIL import Image

from pixart_pack.demo.client import Interrupted, PromptError
from pixart_pack.pixart.data.features import open_features
from pixart_pack.tests.host.graph import VAE, Graph

T5 = "pixart_demo_t5.safetensors"
COUNT = 40


def draw(number, size=(64, 64)):
    noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture
def folder(host, request):
    """A folder in the server's input folder, named as the test."""
    folder = host.models.parent / "input" / request.node.originalname
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(3):
        draw(number, (96, 64) if number == 2 else (64, 64)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    return folder


def encode_graph(folder, **changes):
    """(graph, the number of the dataset node, that of the encoding node)."""
    graph = Graph()
    dataset = graph.add("PixArtDataset", path=folder.name, kind="auto")
    encoded = graph.add(
        "PixArtEncodeDataset",
        dataset=dataset,
        clip=graph.add("PixArtLoadT5", text_encoder=T5),
        vae=graph.add("VAELoader", vae_name=VAE),
        **{"resolution": 64, "caption_length": 20, "name": folder.name, **changes},
    )
    graph.add("PreviewAny", source=[encoded[0], 1])
    return graph.nodes, dataset[0], encoded[0]


def run(host, nodes):
    """({node: its text}, whether a picture was shown)."""
    events = host.events(nodes, 300)
    texts = {data["node"]: data["output"]["text"][0] for kind, data in events if kind == "executed" and data["output"]}
    return texts, any(kind == "preview" for kind, _ in events)


def shards(host, folder):
    return sorted((host.output / "pixart_cache" / folder.name).glob("*.safetensors"))


def test_a_dataset_is_encoded_with_previews_and_only_once(host, folder):
    nodes, dataset, encoded = encode_graph(folder)
    texts, shown = run(host, nodes)
    assert texts[dataset] == "3 pictures" and shown
    assert texts[encoded] == "3 encoded pictures, captions of width 64\n64 x 64: 2\n80 x 48: 1"
    before = shards(host, folder)
    nodes, dataset, encoded = encode_graph(folder, batch_size=2)
    texts, shown = run(host, nodes)
    assert not shown and shards(host, folder) == before

    (folder / "1.txt").write_text("another caption", encoding="utf-8")
    texts, shown = run(host, nodes)
    assert not shown and len(shards(host, folder)) == len(before) + 1
    features = open_features(host.output / "pixart_cache" / folder.name)
    assert [features[index].text for index in range(3)] == ["picture 0", "another caption", "picture 2"]


def test_an_interrupted_encoding_goes_on(host, folder):
    for number in range(3, COUNT):
        draw(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    nodes, *_ = encode_graph(folder)
    seen = []

    def stop(kind, data):
        if kind == "preview":
            seen.append(data)
            if len(seen) == 3:
                host.interrupt()

    with pytest.raises(Interrupted):
        host.wait(host.queue(nodes), 300, stop)
    assert shards(host, folder)
    again = []
    host.wait(host.queue(nodes), 300, lambda kind, data: again.append(data) if kind == "preview" else None)
    assert 0 < len(again) < COUNT
    assert len(open_features(host.output / "pixart_cache" / folder.name)) == COUNT


def test_the_table_ends_the_prompt_where_it_should(host, folder):
    (folder / "3.png").write_bytes(b"no picture")
    nodes, dataset, _ = encode_graph(folder)
    assert run(host, nodes)[0][dataset].splitlines()[:2] == ["3 pictures; 1 left out", "no caption: 1, unreadable: 1"]
    nodes[dataset]["inputs"]["problems"] = "error"
    with pytest.raises(PromptError, match="PixArtDataset failed: .*Dataset with problems"):
        host.run(nodes, timeout_s=120)
    nodes[dataset]["inputs"]["path"] = "../../etc"
    with pytest.raises(PromptError, match="Path leads out of ComfyUI's input folder"):
        host.run(nodes, timeout_s=120)


def test_the_hosts_dataset_nodes_feed_ours(host, folder):
    graph = Graph()
    clip, vae = graph.add("PixArtLoadT5", text_encoder=T5), graph.add("VAELoader", vae_name=VAE)
    images = graph.add("LoadImageTextDataSetFromFolder", folder=folder.name)
    texts = [images[0], 1]
    own = graph.add("PixArtDatasetFromImages", images=images, captions=texts)
    encoded = graph.add(
        "PixArtEncodeDataset", dataset=own, clip=clip, vae=vae, resolution=64, caption_length=20, name=folder.name
    )
    latents = graph.add("MakeTrainingDataset", images=images, vae=vae, clip=clip, texts=texts)
    buckets = graph.add("ResolutionBucket", latents=latents, conditioning=[latents[0], 1])
    taken = graph.add("PixArtDatasetFromLatents", latents=buckets, conditioning=[buckets[0], 1])
    for link in (encoded, taken):
        graph.add("PreviewAny", source=[link[0], 1])
    found, _ = run(host, graph.nodes)
    assert found[own[0]] == "3 pictures"
    assert found[encoded[0]].startswith("3 encoded pictures, captions of width 64")
    assert found[taken[0]] == "3 encoded pictures, captions of width 64\n64 x 64: 2\n96 x 64: 1"
