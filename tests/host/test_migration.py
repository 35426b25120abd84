"""Graphs made for ComfyUI_ExtraModels' PixArt nodes run with ours in their place."""

import importlib
from pathlib import Path

import pytest
import torch

from pixart_pack.demo.client import PromptError
from pixart_pack.pixart.resolution import ASPECT_RATIOS
from pixart_pack.pixart.weights.detection import detect_config
from pixart_pack.pixart.weights.reading import read_tensors
from pixart_pack.pixart.weights.t5 import detect_t5_config
from pixart_pack.tests import tiny_t5
from pixart_pack.tests.host.graph import VAE, Graph, write_lora, write_t5

MODEL, T5 = "pixart_demo.safetensors", "pixart_demo_t5.safetensors"
OLD_IDS = {
    "PixArtCheckpointLoader",
    "PixArtCheckpointLoaderSimple",
    "PixArtResolutionSelect",
    "PixArtLoraLoader",
    "PixArtT5TextEncode",
    "PixArtResolutionCond",
    "PixArtControlNetCond",
    "PixArtT5FromSD3CLIP",
    "PixArtDPMSampler",
    "T5v11Loader",
    "T5TextEncode",
}
CAPTION = "a large red circle in the center on a white background"


def old_graph(loader: str, text: str, ratio="1.00") -> Graph:
    """A picture in the shape of ComfyUI_ExtraModels' example workflows, in API format."""
    graph = Graph()
    more = {"model": "PixArtMS_XL_2"} if loader == "PixArtCheckpointLoader" else {}
    graph.model = graph.add(loader, ckpt_name=MODEL, **more)
    t5 = {"t5v11_ver": "xxl", "path_type": "file", "device": "cpu", "dtype": "default"}
    graph.t5 = graph.add("T5v11Loader", t5v11_name=T5, **t5)
    graph.positive = graph.add(text, text=CAPTION, T5=graph.t5)
    graph.negative = graph.add(text, text="", T5=graph.t5)
    graph.size = graph.add("PixArtResolutionSelect", model="PixArtMS_XL_2", ratio=ratio)
    return graph


def sampled(graph: Graph, model: list, positive: list, sampler="KSampler") -> dict:
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    inputs = {"model": model, "positive": positive, "negative": graph.negative, "latent_image": latent}
    settings = {"seed": 3, "steps": 2, "cfg": 4.5}
    if sampler == "KSampler":
        settings |= {"sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    else:
        settings |= {"noise_schedule": "linear", "noise_schedule_vp": "discrete"}
    latent = graph.add(sampler, **inputs, **settings)
    pixels = graph.add("VAEDecode", samples=latent, vae=graph.add("VAELoader", vae_name=VAE))
    graph.add("SaveImage", images=pixels, filename_prefix="old")
    for node in graph.nodes.values():
        node["_meta"] = {"title": ""}  # as the editor exports it; the host's replacement needs it
    return graph.nodes


@pytest.fixture(scope="module")
def host(start_host):
    return start_host()


@pytest.fixture
def models_t5(comfy):
    """The name of a tiny T5 in the folder of text encoders."""
    path = Path(importlib.import_module("folder_paths").get_folder_paths("text_encoders")[0]) / "old_t5.safetensors"
    write_t5(path)
    yield path.name
    path.unlink()


def test_every_old_node_has_a_successor(host):
    replacements = host.get_json("/node_replacements")
    nodes = host.object_info()
    assert OLD_IDS <= replacements.keys()
    assert not OLD_IDS & nodes.keys()
    for old in OLD_IDS:
        for replacement in replacements[old]:
            new = nodes[replacement["new_node_id"]]
            known = {**new["input"].get("required", {}), **new["input"].get("optional", {})}
            assert {each["new_id"] for each in replacement["input_mapping"]} <= known.keys(), old
            assert all(each["new_idx"] < len(new["output"]) for each in replacement["output_mapping"]), old


@pytest.mark.parametrize("loader", ["PixArtCheckpointLoader", "PixArtCheckpointLoaderSimple"])
@pytest.mark.parametrize("text", ["PixArtT5TextEncode", "T5TextEncode"])
def test_a_picture_is_made(host, loader, text):
    graph = old_graph(loader, text)
    assert host.run(sampled(graph, graph.model, graph.positive))[0].size == (64, 64)


def test_the_reference_sampler_is_dpm_solver(host):
    graph = old_graph("PixArtCheckpointLoader", "PixArtT5TextEncode")
    old = host.run(sampled(graph, graph.model, graph.positive, "PixArtDPMSampler"))[0]
    graph = old_graph("PixArtCheckpointLoader", "PixArtT5TextEncode")
    nodes = sampled(graph, graph.model, graph.positive)
    sampler = next(node for node in nodes.values() if node["class_type"] == "KSampler")
    sampler["inputs"] |= {"sampler_name": "pixart_dpm_solver", "scheduler": "pixart_uniform"}
    assert old.tobytes() == host.run(nodes)[0].tobytes()


def test_a_lora_and_a_size_stay_in_place(host):
    tensors, _ = read_tensors(Path(__file__).parents[2] / "demo" / "models" / "diffusion_models" / MODEL)
    write_lora(host.models / "loras" / "old.safetensors", detect_config(tensors), "transformer.")
    graph = old_graph("PixArtCheckpointLoaderSimple", "PixArtT5TextEncode")
    plain = host.run(sampled(graph, graph.model, graph.positive))[0]
    graph = old_graph("PixArtCheckpointLoaderSimple", "PixArtT5TextEncode")
    model = graph.add("PixArtLoraLoader", model=graph.model, lora_name="old.safetensors", strength=0.8)
    changed = host.run(sampled(graph, model, graph.positive))[0]
    graph = old_graph("PixArtCheckpointLoaderSimple", "PixArtT5TextEncode")
    positive = graph.add("PixArtResolutionCond", cond=graph.positive, width=512, height=96)
    sized = host.run(sampled(graph, graph.model, positive))[0]
    assert len({plain.tobytes(), changed.tobytes(), sized.tobytes()}) == 3


@pytest.mark.parametrize(("ratio", "size"), [("0.25", (512, 2048)), ("0.57", (768, 1344)), ("1.00", (1024, 1024))])
def test_old_ratios_give_their_old_sizes(run_node, ratio, size):
    """There a ratio was width / height."""
    width, height, *_ = run_node("PixArtResolution", base="PixArtMS_XL_2", mode="by ratio", ratio=ratio)
    assert (width, height) == size
    width, height, *_ = run_node("PixArtResolution", base="PixArtMS_Sigma_XL_2_2K", mode="by ratio", ratio=ratio)
    assert (height, width) in ASPECT_RATIOS[2048].values()


def test_unknown_ratios_are_refused(host):
    graph = Graph()
    size = graph.add("PixArtResolution", base="1024", mode="by ratio", ratio="9.99")
    graph.add("PreviewAny", source=size)
    with pytest.raises(PromptError, match="Unknown ratio: got '9.99'"):
        host.run(graph.nodes)


def test_control_conditioning_asks_for_what_is_new(host):
    graph = old_graph("PixArtCheckpointLoader", "PixArtT5TextEncode")
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    positive = graph.add("PixArtControlNetCond", cond=graph.positive, latent=latent)
    with pytest.raises(PromptError, match="PixArtControlNetApply: Required input is missing"):
        host.run(sampled(graph, graph.model, positive))


def test_t5_is_taken_out_of_a_clip_of_several(run_node, models_t5):
    """A CLIP made as SD3's, with a tiny T5, encodes as that T5 loaded alone does."""
    alone = run_node("PixArtLoadT5", text_encoder=models_t5)[0]
    several = sd3_clip()
    taken = run_node("PixArtT5FromClip", clip=several)[0]
    expected, got = (run_node("PixArtTextEncode", clip=clip, text=CAPTION)[0] for clip in (alone, taken))
    assert torch.equal(expected[0][0], got[0][0])
    assert torch.equal(expected[0][1]["attention_mask"], got[0][1]["attention_mask"])


def test_a_clip_without_t5_is_refused(run_node, models_t5):
    clip = run_node("PixArtLoadT5", text_encoder=models_t5)[0]
    clip.cond_stage_model.t5xxl, kept = None, clip.cond_stage_model.t5xxl
    with pytest.raises(ValueError, match="No T5 in this CLIP"):
        run_node("PixArtT5FromClip", clip=clip)
    clip.cond_stage_model.t5xxl = kept


def sd3_clip():
    """A CLIP of SD3's class whose T5 is the tiny one."""
    sd, sd3 = (importlib.import_module(f"comfy.{name}") for name in ("sd", "text_encoders.sd3_clip"))
    target = type("Target", (), {})()
    target.params = {}
    target.clip = lambda **fields: sd3.SD3ClipModel(clip_l=False, clip_g=False, t5=True, **fields)
    target.tokenizer = sd3.SD3Tokenizer
    weights = tiny_t5.weights_of(tiny_t5.make_t5())
    options = {
        "dtype": torch.float32,
        "t5xxl_model_config": detect_t5_config(weights, "tiny", {"feed_forward_proj": "gated-gelu"}),
    }
    return sd.CLIP(target, parameters=1, state_dict=[weights], model_options=options)
