"""The dials through the prompt queue of a real server: alone, together, and with what users combine them with."""

import numpy as np
import pytest

from pixart_pack.demo.client import Interrupted, PromptError
from pixart_pack.pixart.weights.controlnets import save_controlnet
from pixart_pack.tests.host.graph import PictureGraph, write_lora, write_pixart, write_t5
from pixart_pack.tests.host.test_controlnet_host import control_weights
from pixart_pack.tests.host.test_controlnet_queue import hint_of
from pixart_pack.tests.tiny_pixart import tiny_config

CONFIG = tiny_config(depth=4, base_size=4, pe_scale=1.0)
FILES = ("dials_base.safetensors", "dials_t5.safetensors")
CONTROL, LORA = "dials_control.safetensors", "dials_lora.safetensors"
NODES = ("PixArtBlockCache", "PixArtGuidanceInterval", "PixArtGuidanceReuse", "PixArtKVCompression")
STRONG = {  # settings that change the picture of four steps
    "PixArtBlockCache": {"threshold": 2.0, "start_percent": 0.0},
    "PixArtGuidanceInterval": {"start_percent": 0.5, "end_percent": 1.0},
    "PixArtGuidanceReuse": {"every": 2, "start_percent": 0.0},
    "PixArtKVCompression": {"factor": 2, "blocks": "all"},
}
NEUTRAL = {
    "PixArtBlockCache": {"threshold": 0.0},
    "PixArtGuidanceInterval": {"start_percent": 0.0, "end_percent": 1.0},
    "PixArtGuidanceReuse": {"every": 1},
    "PixArtKVCompression": {"factor": 1},
}


@pytest.fixture
def server(host):
    if not (host.models / "loras" / LORA).exists():
        write_pixart(host.models / "diffusion_models" / FILES[0], CONFIG)
        write_t5(host.models / "text_encoders" / FILES[1])
        save_controlnet(host.models / "controlnet" / CONTROL, control_weights(CONFIG), CONFIG)
        write_lora(host.models / "loras" / LORA, CONFIG, "transformer.")
    return host


class DialGraph(PictureGraph):
    """A picture's workflow with dials on its model."""

    def __init__(self, **settings):
        super().__init__(*FILES)
        self.turn(**settings)

    def turn(self, **settings):
        """settings: node -> its inputs."""
        for node, inputs in settings.items():
            self.model = self.add(node, model=self.model, **inputs)

    def steer(self, host, size):
        control = self.add("PixArtLoadControlNet", controlnet=CONTROL)
        self.positive = self.add(
            "PixArtControlNetApply", positive=self.positive, negative=self.negative, control_net=control, vae=self.vae,
            image=self.add("LoadImage", image=hint_of(host, size)), strength=1.0, start_percent=0.0, end_percent=0.8,
        )  # fmt: skip
        self.negative = [self.positive[0], 1]


def pictures(host, graph, size=(64, 64), batch=1, **settings):
    nodes = graph.save(graph.sample(graph.empty(*size, batch), **{"steps": 4, **settings}))
    return [np.asarray(image.convert("RGB"), np.float32) for image in host.run(nodes, timeout_s=300)]


@pytest.mark.parametrize("node", NODES)
def test_neutral_settings_give_the_exact_picture_and_others_do_not(server, node):
    exact = pictures(server, DialGraph())[0]
    assert np.array_equal(pictures(server, DialGraph(**{node: NEUTRAL[node]}))[0], exact)
    assert np.abs(pictures(server, DialGraph(**{node: STRONG[node]}))[0] - exact).max() > 1


@pytest.mark.parametrize(("size", "batch"), [((72, 104), 3), ((40, 64), 1)])
def test_all_dials_with_a_control_and_a_lora(server, size, batch):
    def draw(**settings):
        graph = DialGraph()
        graph.model = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=LORA, strength_model=0.5)
        graph.turn(**settings)
        graph.steer(server, size)
        return pictures(server, graph, size, batch, steps=6)

    exact, found = draw(), draw(**STRONG)
    assert [picture.shape for picture in found] == [(size[1], size[0], 3)] * batch
    assert all(np.abs(one - other).max() > 1 for one, other in zip(found, exact, strict=True))
    for one, other in zip(draw(**NEUTRAL), exact, strict=True):
        assert np.array_equal(one, other)
    server.unload()  # or the results that are kept would be shown
    for one, other in zip(draw(**STRONG), found, strict=True):
        assert np.array_equal(one, other)


def test_every_solver_with_all_dials(server):
    names = server.object_info("KSampler")["input"]["required"]["sampler_name"][0]
    ours = [name for name in names if name.startswith("pixart")]
    graph = DialGraph(**STRONG)
    for name in (*ours, "dpm_2", "heun", "euler_ancestral", "uni_pc"):
        graph.save(graph.sample(graph.empty(), sampler_name=name, steps=1 if "dmd" in name else 4))
    assert len(server.run(graph.nodes, timeout_s=300)) == len(ours) + 4
    assert "PixArt Block Cache:" in server.log()


def test_an_interrupted_run_leaves_nothing(server):
    expected = pictures(server, DialGraph(**STRONG), steps=5)[0]
    graph = DialGraph(**STRONG)
    nodes = graph.save(graph.sample(graph.empty(256, 256, 4), steps=500))

    def stop(kind, data):
        if kind == "progress" and data["value"] == 3:
            server.interrupt()

    with pytest.raises(Interrupted):
        server.wait(server.queue(nodes), 300, stop)
    server.unload()  # or the results that are kept would be shown
    assert np.array_equal(pictures(server, DialGraph(**STRONG), steps=5)[0], expected)


def test_the_cache_that_runs_no_block(server):
    """Two models in one graph, a size and a prompt that change, and the same again: nothing of one reaches another."""

    def graph_of(threshold):
        return DialGraph(PixArtBlockCache={"threshold": threshold, "start_percent": 0.0, "mode": "input, forecast"})

    exact, found = pictures(server, DialGraph(), steps=6)[0], pictures(server, graph_of(0.3), steps=6)[0]
    assert np.abs(found - exact).max() > 1
    graph = graph_of(0.3)
    first = graph.sample(graph.empty(64, 64, 1), steps=6)
    graph.turn(PixArtBlockCache={"threshold": 0.0, "mode": "input, forecast"})
    graph.save(first)
    graph.save(graph.sample(graph.empty(72, 104, 2), steps=6))
    server.unload()  # or the results that are kept would be shown
    shown = [np.asarray(image.convert("RGB"), np.float32) for image in server.run(graph.nodes, timeout_s=300)]
    assert len(shown) == 3 and any(each.shape == found.shape and np.array_equal(each, found) for each in shown)


def test_what_is_wrong_is_said(server):
    for settings, message in (
        ({"PixArtBlockCache": {"threshold": 0.3, "first_block": 3, "last_block": 9}}, "Wrong blocks: got 3 to 9"),
        ({"PixArtGuidanceInterval": {"start_percent": 0.7, "end_percent": 0.2}}, "Empty interval: got start 0.7"),
        ({"PixArtGuidanceReuse": {"every": 2, "start_percent": 0.7, "end_percent": 0.2}}, "Empty interval"),
        ({"PixArtKVCompression": {"factor": 2, "start_percent": 0.7, "end_percent": 0.2}}, "Empty interval"),
    ):
        with pytest.raises(PromptError, match=message):
            pictures(server, DialGraph(**settings))


def test_decoding_in_tiles(server):
    """As a 2K picture has to be decoded on a small card; here smaller, and not in whole tiles."""
    graph = DialGraph()
    latent = graph.sample(graph.empty(424, 296), steps=1)
    graph.save(latent)
    tiles = {"tile_size": 256, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    pixels = graph.add("VAEDecodeTiled", samples=latent, vae=graph.vae, **tiles)
    graph.add("SaveImage", images=pixels, filename_prefix="tiled")
    whole, tiled = (np.asarray(image.convert("RGB"), np.float32) for image in server.run(graph.nodes, timeout_s=300))
    assert whole.shape == tiled.shape == (296, 424, 3)
    assert np.abs(whole - tiled).mean() < 4  # of 255; what lies near a tile's edge differs
