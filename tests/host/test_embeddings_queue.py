"""Prompts in files through the prompt queue of a real server: saved with T5, drawn from without one."""

import numpy as np
import pytest

from pixart_pack.demo.client import PromptError
from pixart_pack.tests.host.graph import VAE, Graph, PictureGraph, write_pixart, write_t5
from pixart_pack.tests.tiny_pixart import tiny_config

CONFIG = tiny_config(depth=2, base_size=4, pe_scale=1.0)
FILES = ("embeddings_base.safetensors", "embeddings_t5.safetensors")
SIDES = ("positive", "negative")


@pytest.fixture
def server(host):
    if not (host.models / "text_encoders" / FILES[1]).exists():
        write_pixart(host.models / "diffusion_models" / FILES[0], CONFIG)
        write_t5(host.models / "text_encoders" / FILES[1])
    return host


def with_t5(server, text):
    """A picture of a text, whose prompts are saved on the way. Returns it and the names of the files."""
    graph = PictureGraph(*FILES, text=text)
    graph.save(graph.sample(graph.empty()))
    saves = {
        graph.add(
            "PixArtSavePromptEmbeddings", conditioning=getattr(graph, side), filename_prefix=f"queue_embeds/{side}"
        )[0]: side
        for side in SIDES
    }
    done = [event for name, event in server.events(graph.nodes, 300) if name == "executed"]
    names = {
        saves[event["node"]]: event["output"]["text"][0].removeprefix("Saved ")
        for event in done
        if event["node"] in saves
    }
    return draw(server, graph.nodes), names


def draw(server, nodes):
    return np.asarray(server.run(nodes, timeout_s=300)[0].convert("RGB"), np.float32)


def differ(one, other):
    return np.abs(one - other).max() > 1  # of 255: float32 noise can tip a value over to the next


def without_t5(names):
    """The same picture from the files alone."""
    graph = Graph()
    loaded = {side: graph.add("PixArtLoadPromptEmbeddings", embeddings=names[side]) for side in SIDES}
    latent = graph.add(
        "KSampler", model=graph.add("PixArtLoadCheckpoint", checkpoint=FILES[0]), **loaded, seed=7, steps=2, cfg=3.0,
        latent_image=graph.add("EmptyLatentImage", width=64, height=64, batch_size=1), sampler_name="euler",
        scheduler="simple", denoise=1.0,
    )  # fmt: skip
    pixels = graph.add("VAEDecode", samples=latent, vae=graph.add("VAELoader", vae_name=VAE))
    graph.add("SaveImage", images=pixels, filename_prefix="queue")
    return graph.nodes


def test_a_graph_without_t5_draws_the_same_picture(server):
    expected, names = with_t5(server, "a red circle on a white background")
    assert set(names) == set(SIDES)
    assert not differ(draw(server, without_t5(names)), expected)
    # Another file under the same name: what was kept of the first is not shown again.
    positive, negative = (server.output / names[side].removeprefix("output/") for side in SIDES)
    positive.write_bytes(negative.read_bytes())
    assert differ(draw(server, without_t5(names)), expected)


def test_names_that_lead_away_are_refused(server):
    with_t5(server, "a red circle")
    for name in ("output/../../secret.safetensors", "/etc/passwd"):
        with pytest.raises(PromptError, match="[Nn]ot in list|not found"):
            server.run(without_t5(dict.fromkeys(SIDES, name)), timeout_s=60)
    graph = PictureGraph(*FILES)
    graph.add("PixArtSavePromptEmbeddings", conditioning=graph.positive, filename_prefix="../away")
    with pytest.raises(PromptError, match="Unusable file name: got '../away'"):
        server.run(graph.nodes, timeout_s=120)
