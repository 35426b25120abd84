"""LoRA nodes through the prompt queue of a real server, as a user wires them, on a tiny PixArt with random weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pixart_pack.demo.client import Interrupted, PromptError
from pixart_pack.pixart.checkpoint import config_to_tensor
from pixart_pack.pixart.lora import merge, read_lora, save_lora
from pixart_pack.tests.host.graph import PictureGraph, write_pixart, write_t5
from pixart_pack.tests.host.test_queue import differ, pictures
from pixart_pack.tests.lora.test_reading import KOHYA, renamed
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config

FILES = ("lora_tiny.safetensors", "lora_t5.safetensors")
TUNED = "lora_tuned.safetensors"
CONFIG = tiny_config(base_size=4, pe_scale=1.0)
PEFT, ONETRAINER, BARE, DORA, ORIGINAL = (
    f"lora_{name}.safetensors" for name in ("peft", "onetrainer", "bare", "dora", "original")
)
FOLDER, WIDE, FOREIGN = "lora_folder/", "lora_wide.safetensors", "lora_foreign.safetensors"
BARE_HOST = "lora_bare_host.safetensors"


def attention_lora(seed=0, width=CONFIG.hidden_size):
    """PEFT's keys and random values, of a size that shows in the picture."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for index in range(CONFIG.depth):
        for name in ("attn1.to_q", "attn1.to_v", "attn2.to_k", "attn2.to_out.0"):
            key = f"base_model.model.transformer_blocks.{index}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, width, generator=generator) * 0.4
            tensors[f"{key}.lora_B.weight"] = torch.randn(width, 4, generator=generator) * 0.4
    return tensors


def with_magnitudes(adapter):
    lengths = {f"{key.rsplit('.lora_', 1)[0]}.lora_magnitude_vector": torch.rand(48) + 0.5 for key in adapter}
    return {**adapter, **lengths}


def fill(host):
    """Write the models and LoRAs, once for each server."""
    models, loras = host.models / "diffusion_models", host.models / "loras"
    if (loras / PEFT).exists():
        return host
    write_pixart(models / FILES[0], CONFIG)
    write_t5(host.models / "text_encoders" / FILES[1])
    loras.mkdir(parents=True, exist_ok=True)
    adapter = attention_lora()
    save_file(renamed(adapter, "lora_transformer_", **KOHYA), loras / ONETRAINER)
    save_file(renamed(adapter, "", alpha=8.0), loras / BARE)
    save_file(with_magnitudes(adapter), loras / DORA)
    original = {
        f"base_model.model.blocks.{index}.attn.qkv.lora_{side}.weight": torch.full(shape, 0.05)
        for index in range(CONFIG.depth)
        for side, shape in (("A", (4, 48)), ("B", (144, 4)))
    }
    save_file(original, loras / ORIGINAL)
    save_file(attention_lora(width=64), loras / WIDE)
    save_file({"lora_unet_down_blocks_0_x.lora_up.weight": torch.ones(4, 2)}, loras / FOREIGN)
    save_file(adapter, loras / PEFT)
    save_lora(loras / FOLDER, read_lora(loras / PEFT).factors, layout="peft")
    tuned = merge(make_weights(CONFIG), read_lora(loras / PEFT))
    save_file({**tuned, "pixart_config": config_to_tensor(CONFIG)}, models / TUNED)
    return host


@pytest.fixture
def server(host):
    return fill(host)


def close(one, other, without):
    """Whether two ways to one LoRA agree: random weights and guidance enlarge float32 noise to a few of 255.

    Next to what the LoRA does that is nothing; the weights themselves are compared in test_lora_host.py.
    """
    return np.abs(one - other).mean() < 0.01 * np.abs(other - without).mean()


class LoraGraph(PictureGraph):
    def __init__(self, **load):
        super().__init__(*FILES, **load)

    def lora(self, name, strength=1.0, model=None, **settings):
        """Load PixArt LoRA; returns the MODEL."""
        model = model or self.model
        return self.add("PixArtLoadLoRA", model=model, lora=name, strength=strength, **settings)

    def host_lora(self, name, strength=1.0, model=None):
        """ComfyUI's own loader; returns the MODEL."""
        model = model or self.model
        return self.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)

    def pictures(self, host, *models, **settings):
        """One picture with each MODEL."""
        for model in models:
            self.save(self.sample(self.empty(), model=model, **settings))
        return pictures(host, self.nodes)


def test_every_file_of_one_lora_makes_the_same_picture(server):
    graph = LoraGraph()
    names = (PEFT, FOLDER, ONETRAINER, BARE)
    plain, tuned, *found = graph.pictures(
        server, graph.model, graph.add("PixArtLoadCheckpoint", checkpoint=TUNED), *map(graph.lora, names)
    )
    assert differ(plain, tuned)
    for name, picture in zip(names, found, strict=True):
        assert close(picture, tuned, plain), name
        assert not differ(picture, found[0]), name


def test_other_files_and_the_model_stays_as_it_is(server):
    graph = LoraGraph()
    found = graph.pictures(server, graph.model, graph.lora(DORA), graph.lora(ORIGINAL), graph.lora(PEFT, 0.0))
    assert differ(found[0], found[1])
    assert differ(found[0], found[2])
    assert np.array_equal(found[0], found[3])  # a strength of 0 changes no bit
    again = LoraGraph()
    assert np.array_equal(again.pictures(server, again.model)[0], found[0])


@pytest.mark.parametrize("flags", [(), ("--fast", "--force-fp16")])
def test_strengths_add_up_over_the_hosts_loader(start_host, flags):
    server, graph = fill(start_host(*flags)), LoraGraph()
    twice = graph.lora(PEFT, 0.75, graph.lora(FOLDER, 0.25))
    undone = graph.lora(PEFT, -1.0, graph.lora(PEFT))
    # ComfyUI reads this file without its alpha of 8 at rank 4: half the strength.
    over = graph.lora(PEFT, 0.5, graph.host_lora(PEFT, 1.0))
    under = graph.host_lora(PEFT, 1.0, graph.lora(PEFT, 0.5))
    plain, once, *found = graph.pictures(server, graph.model, graph.lora(PEFT), twice, over, under, undone)
    assert differ(plain, once)
    for picture, expected in zip(found, (once, once, once, plain), strict=True):
        # Weights in half precision are rounded in every sum; a LoRA more or less is far further off.
        half = np.abs(picture - expected).mean() < 0.25 * np.abs(plain - once).mean()
        assert half if flags else close(picture, expected, once if expected is plain else plain)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2"])
def test_narrow_weights(server, dtype):
    graph = LoraGraph(weight_dtype=dtype)
    found = graph.pictures(server, graph.model, graph.lora(PEFT), graph.lora(DORA, 0.5), graph.lora(PEFT, 0.0))
    assert differ(found[0], found[1])
    assert differ(found[0], found[2])
    assert np.array_equal(found[0], found[3])
    assert all(picture.std() > 1 for picture in found)


def test_together_with_a_hooked_lora(server):
    """ComfyUI's hooks patch a LoRA in for one prompt, over those that are on the MODEL."""
    graph = LoraGraph()
    hooks = graph.add("CreateHookLoraModelOnly", lora_name=BARE_HOST, strength_model=0.5, strength_clip=0.0)
    hooked = {
        side: graph.add("ConditioningSetProperties", cond_NEW=link, strength=1.0, set_cond_area="default", hooks=hooks)
        for side, link in (("positive", graph.positive), ("negative", graph.negative))
    }
    save_lora(server.models / "loras" / BARE_HOST, read_lora(server.models / "loras" / BARE).factors)
    half = graph.lora(PEFT, 0.5)
    graph.save(graph.sample(graph.empty(), model=half, **hooked))
    found, whole, alone = graph.pictures(server, graph.lora(PEFT), half)
    assert close(found, whole, alone)


@pytest.mark.parametrize("layout", ["host", "kohya", "peft"])
def test_convert_and_load_again(server, layout):
    graph = LoraGraph()
    info = graph.add("PixArtConvertLoRA", lora=ONETRAINER, layout=layout, filename_prefix=f"loras/queue_{layout}")
    [text] = server.wait(server.queue(graph.nodes), 120)["outputs"][info[0]]["text"]
    name = text.splitlines()[0].rsplit("/", 1)[1]
    assert (server.output / "loras" / name).exists()
    assert "keys: 36 of 36 matched" in text
    again = LoraGraph()
    load = again.host_lora if layout != "peft" else again.lora
    expected, found = again.pictures(server, again.lora(ONETRAINER), load(f"{name}/" if layout == "peft" else name))
    assert not differ(expected, found)


def test_extract_and_load_again_with_the_hosts_loader(server):
    graph = LoraGraph()
    tuned = graph.add("PixArtLoadCheckpoint", checkpoint=TUNED)
    extracted = graph.add(
        "PixArtExtractLoRA", model=tuned, base=graph.model, rank=8, energy=1.0, filename_prefix="loras/queue_extracted",
        biases=True, dtype="fp32",
    )  # fmt: skip
    graph.save(graph.sample(graph.empty(), model=tuned))
    graph.save(graph.sample(graph.empty(), model=extracted))
    events = server.events(graph.nodes)
    assert [data for kind, data in events if kind == "progress" and data.get("node") == extracted[0]]
    again = LoraGraph()
    again.save(again.sample(again.empty(), model=again.add("PixArtLoadCheckpoint", checkpoint=TUNED)))
    expected, found, plain = again.pictures(server, again.host_lora("queue_extracted_00001_.safetensors"), again.model)
    assert close(found, expected, plain)


def test_interrupting_an_extraction(server):
    graph = LoraGraph()
    write_pixart(server.models / "diffusion_models" / "lora_deep.safetensors", tiny_config(depth=120))
    write_pixart(server.models / "diffusion_models" / "lora_deep_tuned.safetensors", tiny_config(depth=120), seed=1)
    models = {
        side: graph.add("PixArtLoadCheckpoint", checkpoint=f"lora_deep{end}.safetensors")
        for side, end in (("base", ""), ("model", "_tuned"))
    }
    node = graph.add("PixArtExtractLoRA", **models, rank=8, energy=1.0, filename_prefix="loras/queue_interrupted")

    def stop(kind, data):
        if kind == "progress" and data.get("node") == node[0]:
            server.interrupt()

    with pytest.raises(Interrupted):
        server.wait(server.queue(graph.nodes), 120, stop)
    assert not list((server.output / "loras").glob("*interrupted*"))
    again = LoraGraph()
    assert again.pictures(server, again.model)  # the server goes on


@pytest.mark.parametrize(
    ("node", "inputs", "message"),
    [
        ("PixArtLoadLoRA", {"lora": WIDE, "strength": 1.0}, r"width mismatch at .*got a change of shape \(64, 64\)"),
        ("PixArtLoadLoRA", {"lora": FOREIGN, "strength": 1.0}, "No key of this LoRA is a PixArt's"),
        ("PixArtLoadLoRA", {"lora": "../secret.safetensors", "strength": 1.0}, "not in list"),
        ("PixArtLoadLoRA", {"lora": PEFT, "strength": 1000.0}, "bigger than max"),
        ("PixArtConvertLoRA", {"lora": PEFT, "layout": "host", "filename_prefix": "../x"}, "Unusable file name"),
    ],
)
def test_mistakes_are_told(server, node, inputs, message):
    graph = LoraGraph()
    if node == "PixArtLoadLoRA":
        graph.save(graph.sample(graph.empty(), model=graph.add(node, model=graph.model, **inputs)))
    else:
        graph.add(node, **inputs)
    with pytest.raises(PromptError, match=message):
        server.run(graph.nodes)
