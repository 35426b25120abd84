"""Graphs made for ComfyUI_ExtraModels' PixArt nodes run with ours in their place."""

import asyncio
import copy
import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch

from pixart_pack.demo.client import PromptError
from pixart_pack.devtools.server import PACK
from pixart_pack.pixart.resolution import ASPECT_RATIOS
from pixart_pack.pixart.weights.detection import detect_config
from pixart_pack.pixart.weights.reading import read_tensors
from pixart_pack.pixart.weights.t5 import detect_t5_config
from pixart_pack.tests import tiny_t5
from pixart_pack.tests.host.graph import VAE, Graph, write_lora, write_t5
from pixart_pack.tests.host.server import start

DEMO = Path(__file__).resolve().parent.parent.parent / "demo" / "models"
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
    assert all(nodes[old]["deprecated"] for old in OLD_IDS)
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


# In the shapes in which programs send such graphs: without `_meta`, with files as other systems name them.
def swarm(host):
    """As SwarmUI sends it: its own numbers, the T5 on the CPU, the size in a conditioning."""
    return {
        "100": {
            "class_type": "T5v11Loader",
            "inputs": {
                "t5v11_name": T5,
                "t5v11_ver": "xxl",
                "path_type": "file",
                "device": "cpu",
                "dtype": "FP32",
            },
        },
        "4": {"class_type": "PixArtCheckpointLoader", "inputs": {"ckpt_name": MODEL, "model": "PixArtMS_Sigma_XL_2"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "T5TextEncode", "inputs": {"text": CAPTION, "T5": ["100", 0]}},
        "7": {"class_type": "T5TextEncode", "inputs": {"text": "", "T5": ["100", 0]}},
        "8": {"class_type": "PixArtResolutionCond", "inputs": {"cond": ["6", 0], "width": 64, "height": 64}},
        "10": {
            "class_type": "KSamplerAdvanced",
            "inputs": {
                "model": ["4", 0],
                "add_noise": "enable",
                "noise_seed": 3,
                "steps": 2,
                "cfg": 4.5,
                "sampler_name": "euler",
                "scheduler": "normal",
                "positive": ["8", 0],
                "negative": ["7", 0],
                "latent_image": ["5", 0],
                "start_at_step": 0,
                "end_at_step": 10000,
                "return_with_leftover_noise": "disable",
            },
        },
        "11": {"class_type": "VAELoader", "inputs": {"vae_name": VAE}},
        "12": {"class_type": "VAEDecode", "inputs": {"samples": ["10", 0], "vae": ["11", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["12", 0], "filename_prefix": "swarm"}},
    }


def with_t5(name, path_type="folder", device="cpu"):
    def make(host):
        graph = old_graph("PixArtCheckpointLoader", "PixArtT5TextEncode")
        t5 = graph.nodes[graph.t5[0]]["inputs"]
        t5.update(t5v11_name=name, path_type=path_type, device=device)
        return sampled(graph, graph.model, graph.positive)

    return make


def reference(host):
    """With the sampler of the pack's own, the size from its node, and a title's worth of `_meta` on one node alone."""
    graph = old_graph("PixArtCheckpointLoaderSimple", "PixArtT5TextEncode", ratio="0.52")
    graph.nodes["1"]["_meta"] = {"title": "Load"}
    positive = graph.add("PixArtResolutionCond", cond=graph.positive, width=graph.size, height=[graph.size[0], 1])
    return sampled(graph, graph.model, positive, "PixArtDPMSampler")


def short(host):
    """Only what the node cannot do without."""
    graph = old_graph("PixArtCheckpointLoader", "T5TextEncode")
    graph.nodes[graph.t5[0]]["inputs"] = {"t5v11_name": T5}
    graph.nodes[graph.model[0]]["inputs"] = {"ckpt_name": MODEL}
    return sampled(graph, graph.model, graph.positive)


@pytest.fixture(scope="module")
def shards(host):
    """The demo's T5 in shards, as ComfyUI_ExtraModels keeps it: in models/t5, and in a folder there."""
    path = DEMO / "text_encoders" / T5
    weights, metadata = read_tensors(path)
    names = sorted(weights)
    for folder in (host.models / "t5" / "T5v1.1", host.models / "t5"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(metadata["t5_config"])
        for number in (1, 2):
            part = {name: weights[name].clone() for name in names[number - 1 :: 2]}
            torch.save(part, folder / f"pytorch_model-0000{number}-of-00002.bin")


# By the words of the table in docs/from-other-tools.md.
SHAPES = {
    "as SwarmUI sends it: nodes numbered by their tasks, KSamplerAdvanced, T5 on the CPU, a size condition": swarm,
    "PixArtDPMSampler with a size from PixArtResolutionSelect, `_meta` on one node alone": reference,
    "required inputs alone, the optional ones absent": short,
    "T5 as one file on the GPU": with_t5(T5, "file", "gpu"),
    "T5 in shards with `path_type: folder`, by Windows' path of one": with_t5(
        "T5v1.1\\pytorch_model-00001-of-00002.bin"
    ),
    "the same by Linux' path of another shard": with_t5("T5v1.1/pytorch_model-00002-of-00002.bin"),
    "T5's shards loose in `models/t5/`": with_t5("pytorch_model-00002-of-00002.bin"),
}


@pytest.mark.parametrize(
    "make", SHAPES.values(), ids=["swarm", "reference", "short", "gpu", "windows", "linux", "root"]
)
def test_prompts_as_programs_send_them(host, shards, make):
    assert host.run(make(host))[0].size == (64, 64)


def test_the_pages_table_names_each_shape_that_is_run():
    page = (Path(__file__).parents[2] / "docs" / "from-other-tools.md").read_text(encoding="utf-8")
    table = page.partition("| prompt over the API |")[2].partition("\n\n")[0].splitlines()[2:]
    assert [row.strip("| ").rpartition(" | ")[0] for row in table] == list(SHAPES)


def test_every_ratio_is_a_size(host):
    graph = Graph()
    for ratio in ASPECT_RATIOS[1024]:
        size = graph.add("PixArtResolutionSelect", model="PixArtMS_XL_2", ratio=f"{ratio:.2f}")
        graph.add("PreviewAny", source=size)
        graph.add("PreviewAny", source=[size[0], 1])
    texts = host.wait(host.queue(graph.nodes))["outputs"]
    sides = [int(texts[number]["text"][0]) for number in sorted(texts, key=int) if "text" in texts[number]]
    assert list(zip(sides[::2], sides[1::2], strict=True)) == list(ASPECT_RATIOS[1024].values())


@pytest.mark.parametrize(
    ("kind", "inputs", "missing"),
    [
        ("PixArtCheckpointLoader", {}, "checkpoint"),
        ("PixArtCheckpointLoader", None, "checkpoint"),
        ("T5v11Loader", {"path_type": "file"}, "text_encoder"),
        ("T5v11Loader", {"t5v11_name": "none.bin"}, "text_encoder"),
        ("PixArtT5TextEncode", {"text": ""}, "clip"),
        ("PixArtLoraLoader", {"lora_name": "none.safetensors"}, "model"),
        ("PixArtDPMSampler", {"seed": 1}, "steps"),
        ("PixArtResolutionCond", {}, "conditioning"),
    ],
)
def test_what_is_missing_is_named_as_it_is_called_now(host, kind, inputs, missing):
    nodes = {"1": {"class_type": kind, **({} if inputs is None else {"inputs": inputs})}}
    nodes["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    with pytest.raises(PromptError, match=rf"\b{missing}\b"):
        host.queue(nodes)


@pytest.mark.parametrize(
    "data",
    [None, [], 3, "prompt", {}, {"prompt": None}, {"prompt": []}, {"prompt": {"1": None, "2": [], "3": {}}}]
    + [{"prompt": {"1": {"class_type": kind, "inputs": {"image": "x"}}}} for kind in (None, [], {}, 1, "LoadImage")],
)
def test_other_requests_stay_as_they_are(pack, data):
    before = copy.deepcopy(data)
    assert replacements().rename(data, migration().REPLACEMENTS) == before


@pytest.mark.parametrize("inputs", [None, [], 3, {"ckpt_name": None}, {"ckpt_name": [[], {}]}, {"model": {}}])
def test_any_inputs_are_renamed_without_an_error(pack, inputs):
    data = {"prompt": {"1": {"class_type": "PixArtCheckpointLoader", "inputs": inputs}}}
    node = replacements().rename(data, migration().REPLACEMENTS)["prompt"]["1"]
    assert node["class_type"] == "PixArtLoadCheckpoint" and isinstance(node["inputs"], dict)


STAND_IN = """
class Old:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "ExtraModels"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"ckpt_name": ("STRING", {})}})
    def run(self, ckpt_name):
        raise ValueError("ran the other pack's")
NODE_CLASS_MAPPINGS = dict.fromkeys(%r, Old)
"""


@pytest.fixture
def extra_models(tmp_path):
    folder = tmp_path / "a_pack_of_old_nodes"
    folder.mkdir()
    (folder / "__init__.py").write_text(STAND_IN % sorted(OLD_IDS))
    return folder


@pytest.mark.parametrize("is_first", [True, False])
def test_the_other_packs_own_nodes_win_in_either_order(pack, extra_models, is_first):
    nodes = importlib.import_module("nodes")
    own = dict(nodes.NODE_CLASS_MAPPINGS)
    try:
        if not is_first:  # as when a server had begun before the other pack was loaded
            replacements().offer_deprecated(migration().REPLACEMENTS)
            assert nodes.NODE_CLASS_MAPPINGS["T5v11Loader"].DEPRECATED
        assert asyncio.run(nodes.load_custom_node(str(extra_models), set(own)))
        replacements().offer_deprecated(migration().REPLACEMENTS)
        assert {nodes.NODE_CLASS_MAPPINGS[old].__name__ for old in OLD_IDS} == {"Old"}
        data = {"prompt": {"1": {"class_type": "T5v11Loader", "inputs": {"t5v11_name": "x"}}}}
        assert replacements().rename(copy.deepcopy(data), migration().REPLACEMENTS) == data
    finally:
        nodes.NODE_CLASS_MAPPINGS.clear()
        nodes.NODE_CLASS_MAPPINGS.update(own)


@pytest.mark.slow
def test_a_server_with_the_other_pack_runs_that_one(comfyui, tmp_path, extra_models):
    base = tmp_path / "base"
    (base / "custom_nodes").mkdir(parents=True)
    shutil.copytree(extra_models, base / "custom_nodes" / extra_models.name)
    server = start(comfyui, base, ("--whitelist-custom-nodes", PACK, extra_models.name))
    try:
        nodes = server.object_info()
        assert "PixArtLoadCheckpoint" in nodes
        assert all(nodes[old]["category"] == "ExtraModels" and not nodes[old].get("deprecated") for old in OLD_IDS)
        graph = Graph()
        graph.add("PreviewAny", source=graph.add("PixArtCheckpointLoader", ckpt_name="x"))
        with pytest.raises(PromptError, match="ran the other pack's"):
            server.run(graph.nodes)
    finally:
        server.close()
        server.server.stop()


def test_deprecated_nodes_ask_as_the_old_ones_did(host):
    nodes = host.object_info()
    for old in OLD_IDS:
        assert nodes[old]["python_module"].endswith(".pixart_pack") and nodes[old]["description"]
    loader = nodes["T5v11Loader"]
    assert loader["input_order"]["required"] == ["t5v11_name", "t5v11_ver", "path_type", "device", "dtype"]
    assert T5 in loader["input"]["required"]["t5v11_name"][0]
    ratios = nodes["PixArtResolutionSelect"]["input"]["required"]["ratio"][0]
    assert "0.52" in ratios and len(ratios) == len(ASPECT_RATIOS[1024])
    assert nodes["PixArtResolutionSelect"]["output"] == ["INT", "INT"]


def test_a_deprecated_node_becomes_ours(pack):
    """Where no prompt handler is, as in a program that runs the queue without a server."""
    nodes = importlib.import_module("nodes")
    own = dict(nodes.NODE_CLASS_MAPPINGS)
    try:
        replacements().offer_deprecated(migration().REPLACEMENTS)
        done = nodes.NODE_CLASS_MAPPINGS["PixArtResolutionSelect"]().expand(model="PixArt_XL_2", ratio="0.57")
        [(number, node)] = done["expand"].items()
        assert node["class_type"] == "PixArtResolution" and node["inputs"]["ratio"] == "0.57"
        assert done["result"] == ([number, 0], [number, 1])
    finally:
        nodes.NODE_CLASS_MAPPINGS.clear()
        nodes.NODE_CLASS_MAPPINGS.update(own)


def replacements():
    return sys.modules["pixart_pack.nodes.host.replacements"]


def migration():
    return sys.modules["pixart_pack.nodes.migration"]
