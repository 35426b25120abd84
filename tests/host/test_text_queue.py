"""The text and size nodes through the prompt queue of a real server."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pixart_pack.demo.client import PromptError
from pixart_pack.pixart.checkpoint import config_to_tensor
from pixart_pack.pixart.weights.quantised.gguf_file import llama_name
from pixart_pack.tests import tiny_t5
from pixart_pack.tests.gguf_files import matrices, write_gguf
from pixart_pack.tests.host.graph import PictureGraph
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(scope="module")
def encoder(start_host):
    """The name of a T5 file in the server's folders."""
    save_file(tiny_t5.weights_of(tiny_t5.make_t5()), start_host().models / "text_encoders" / "tiny_t5.safetensors")
    return "tiny_t5.safetensors"


def encode_workflow(encoder, **inputs):
    return {
        "t5": node("PixArtLoadT5", text_encoder=encoder),
        "size": node("PixArtResolution", base="512", mode="by ratio", ratio="0.57 (7:4)"),
        "positive": node("PixArtTextEncode", clip=["t5", 0], width=["size", 0], height=["size", 1], **inputs),
        "negative": node("PixArtNegative", mode="empty", clip=["t5", 0], positive=["positive", 0]),
        "core": node("CLIPTextEncode", clip=["t5", 0], text="a dog"),
        "both": node("ConditioningConcat", conditioning_to=["positive", 0], conditioning_from=["core", 0]),
        "show": node("PreviewAny", source=["both", 0]),
        "show_negative": node("PreviewAny", source=["negative", 0]),
    }


def test_the_editor_is_told_what_was_cut(host, encoder):
    workflow = encode_workflow(encoder, text="a tall lighthouse " * 80, caption_length="120")
    outputs = {event["node"]: event["output"] for name, event in host.events(workflow, 120) if name == "executed"}
    (notice,) = outputs["positive"]["text"]
    assert "tokens cut (limit 120)" in notice and notice.endswith("a tall lighthouse'")
    assert outputs["negative"]["text"] == ["1 of 300 tokens"]
    assert "pixart_size" in outputs["show"]["text"][0] and "(384, 672)" in outputs["show_negative"]["text"][0]


def test_wrong_files_end_the_prompt_with_their_name(host):
    (host.models / "text_encoders" / "empty.safetensors").write_bytes(b"")
    workflow = {"t5": node("PixArtLoadT5", text_encoder="empty.safetensors")}
    workflow["show"] = node("PreviewAny", source=["t5", 0])
    with pytest.raises(PromptError, match="PixArtLoadT5 failed: .*got 0 bytes in 'empty.safetensors'"):
        host.run(workflow, timeout_s=60)


QUANTISED = tiny_config("sigma-512", hidden_size=64, num_heads=4, caption_channels=32, base_size=4, pe_scale=1.0)


def is_layer(name, weight):
    return weight.ndim == 2 and name.endswith(".weight") and ("blocks." in name or "DenseReluDense" in name)


def quantised(weights, kind):
    """The layers as bitsandbytes has 8 bits, compressed-tensors int8, or modelopt fp8; a plain model for "plain"."""
    stored = dict(weights)
    for name, weight in weights.items() if kind != "plain" else ():
        if not is_layer(name, weight):
            continue
        rows = weight.abs().amax(1, keepdim=True).clamp(min=1e-6)
        codes = (weight / rows * 127).round().to(torch.int8)
        if kind == "bitsandbytes":
            stored |= {name: codes, name.replace("weight", "SCB"): rows.flatten()}
        elif kind == "compressed-tensors":
            stored |= {name: codes, name.replace("weight", "weight_scale"): rows / 127}
        else:
            scale = weight.abs().max() / 448
            stored |= {name: (weight / scale).to(torch.float8_e4m3fn), name.replace("weight", "weight_scale"): scale}
    return {name: weight.contiguous() for name, weight in stored.items()}


def write_quantised(host, kind):
    """Names of a checkpoint and a T5 of this kind in the server's folders."""
    weights, encoder = make_weights(QUANTISED), tiny_t5.weights_of(tiny_t5.make_t5(d_model=32, d_ff=64))
    folders = host.models / "diffusion_models", host.models / "text_encoders"
    folders[0].mkdir(parents=True, exist_ok=True)
    if kind == "GGUF":
        config = [("pixart_config", json.dumps(asdict(QUANTISED)))]
        write_gguf(folders[0] / "queue_q8.gguf", weights, matrices("Q8_0"), "pixart", config)
        named = {llama_name(name): weight for name, weight in encoder.items()}
        write_gguf(folders[1] / "queue_q8.gguf", named, matrices("Q8_0"))
        return "queue_q8.gguf", "queue_q8.gguf"
    name = f"queue_{kind}.safetensors"
    save_file({**quantised(weights, kind), "pixart_config": config_to_tensor(QUANTISED)}, folders[0] / name)
    save_file(quantised(encoder, kind), folders[1] / name)
    return name, name


def draw(host, kind):
    """(the picture, what the T5's loader says)."""
    graph = PictureGraph(*write_quantised(host, kind))
    shown = graph.add("PreviewAny", source=graph.positive)
    events = list(host.events(dict(graph.nodes), 120))
    texts = {data["node"]: data["output"] for name, data in events if name == "executed" and data["output"]}
    assert shown[0] in texts
    (picture,) = host.run(graph.save(graph.sample(graph.empty())), timeout_s=120)
    return np.asarray(picture.convert("RGB"), np.float32), texts.get(graph.clip[0], {}).get("text", [""])[0]


@pytest.fixture(scope="module")
def unquantised(start_host):
    return draw(start_host(), "plain")[0]


@pytest.mark.parametrize("kind", ["GGUF", "bitsandbytes", "compressed-tensors", "modelopt"])
def test_quantised_models_draw_the_picture(host, unquantised, kind):
    picture, text = draw(host, kind)
    assert text.startswith("The weights stay packed (")
    # Eight bits of every layer, through two steps and a decoder: what a wrong scale makes is another picture.
    assert np.abs(picture - unquantised).mean() < 4 < np.abs(picture - unquantised[:, ::-1]).mean()
