"""LoRAs of every layout and kind, against the original's numbers and against PEFT itself."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_pack.pixart.checkpoint import detect_config, to_diffusers, to_original
from pixart_pack.pixart.lora import (
    Difference,
    Factor,
    Hadamard,
    Kronecker,
    LoRA,
    LowRank,
    Target,
    describe_lora,
    export_lora,
    load_lora,
    merge,
    read_lora,
    save_lora,
)
from pixart_pack.pixart.transformer import PixArt
from pixart_pack.tests.goldens import load_golden, take
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config

GOLDENS = ["lora_tiny_512", "lora_tiny_1024ms", "lora_tiny_r16_default_alpha"]
CONFIG = tiny_config(depth=2)
QKV, KV, PROJ = Target.of("blocks.0.attn.qkv"), Target.of("blocks.1.cross_attn.kv_linear"), Target.of("blocks.1.mlp.fc1")
PATCH = Target.of("x_embedder.proj")
# Sums of some ten float32 products of unit size, in another order.
NOISE = {"atol": 2e-6, "rtol": 1e-5}


def golden(name):
    """Base weights in the original layout, the configuration, the adapter and its configuration, and all tensors."""
    case, tensors = load_golden(name)
    given = case["diffusers_config"]
    weights = to_original(take(tensors, "diffusers"))
    config = detect_config(weights, model_config=given, num_heads=given["num_attention_heads"])
    return case, weights, config, take(tensors, "lora"), tensors


def run_model(weights, config, inputs, dtype):
    model = PixArt(config).eval().to(dtype)
    expected = {name: weights.get(name, tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in expected.items()})
    sizes = {name: inputs[name] for name in ("resolution", "aspect_ratio") if name in inputs}
    with torch.no_grad():
        return model(inputs["x"].to(dtype), inputs["timestep"], inputs["y"].to(dtype), inputs["mask"], **sizes)


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_predicts_as_the_original_with_its_lora(name, dtype):
    case, weights, config, adapter, tensors = golden(name)
    lora = load_lora(adapter, case["adapter_config"], config=config)
    assert not lora.unmatched
    assert {factor.scale for factor in lora.factors.values()} == {case["scaling"]}
    weights = {key: tensor.to(dtype) for key, tensor in weights.items()}
    inputs = take(tensors, "input")
    tolerance = {"atol": case["tolerance"]["suggested_atol"], "rtol": case["tolerance"]["suggested_rtol"]}
    kind = "output" if dtype == torch.float32 else "output_f64"
    for strength, output in ((0.0, "base"), (1.0, "lora_unmerged"), (1.0, "lora_merged")):
        found = run_model(merge(weights, lora, strength), config, inputs, dtype)
        torch.testing.assert_close(found.float(), tensors[f"{kind}.{output}"], **tolerance)
