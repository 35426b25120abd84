"""The demo's ControlNet through the queue: edges of a drawn scene, drawn by the pack's own node, are followed."""

import numpy as np
from PIL import Image

from pixart_pack.demo.control import colour_caption
from pixart_pack.demo.evaluate import held_out_scenes
from pixart_pack.demo.evaluate_control import measure
from pixart_pack.demo.scenes import draw_scene
from pixart_pack.tests.host.graph import PictureGraph

FILES = ("pixart_demo.safetensors", "pixart_demo_t5.safetensors")


def control_graph(picture, caption, **apply):
    graph = PictureGraph(*FILES, text=caption)
    image = graph.add("LoadImage", image=picture)
    edges = graph.add("PixArtHEDPreprocessor", image=image, method="soft edges")
    control = graph.add("PixArtLoadControlNet", controlnet="pixart_demo_control.safetensors")
    given = {"positive": graph.positive, "negative": graph.negative, "image": edges, "vae": graph.vae}
    usual = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    applied = graph.add("PixArtControlNetApply", control_net=control, **given, **usual | apply)
    graph.positive, graph.negative = applied, [applied[0], 1]
    latent = graph.empty([edges[0], 1], [edges[0], 2])
    graph.save(graph.sample(latent, steps=20, cfg=4.0, sampler_name="dpmpp_2m", scheduler="normal"))
    return graph.nodes


def test_held_out_scenes_are_followed(host):
    scenes = held_out_scenes(4, 128, 128, seed=3)
    found = {}
    for strength in (0.0, 1.0):
        pictures = []
        for number, scene in enumerate(scenes):
            name = host.upload(Image.fromarray(draw_scene(scene)), f"scene_{number}.png")
            (picture,) = host.run(control_graph(name, colour_caption(scene), strength=strength), timeout_s=300)
            pictures.append(np.asarray(picture.convert("RGB")))
        found[strength] = measure(pictures, scenes)
    # What 100 scenes give is in demo/README.md; four vary.
    assert found[1.0]["overlap"] > 0.6 and found[1.0]["colour"] > 0.6, found
    assert found[0.0]["overlap"] < 0.4, found
