"""Adapters of every kind that PEFT and LyCORIS merge: the same weights as the package itself gives."""

import json
import random
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pixart_pack.benchmarks.adapters import (
    CONFIG,
    LYCORIS_CASES,
    PACKAGE_CASES,
    PEFT_CASES,
    TWICE,
    WEIGHTS,
    WIDE,
    make_transformer,
    randomize,
    save_with_lycoris,
    save_with_peft,
)
from pixart_pack.pixart.checkpoint import expected_shapes
from pixart_pack.pixart.lora import by_peft, load_lora, merge, read_lora
from pixart_pack.tests.lora.test_reading import same_weights

for package in ("diffusers", "peft", "lycoris"):
    pytest.importorskip(package)
pytestmark = pytest.mark.slow  # half a minute in all, with the packages' imports
SAVED_BY_PEFT = {**PEFT_CASES, **PACKAGE_CASES}


@pytest.mark.parametrize("case", SAVED_BY_PEFT)
def test_merges_as_peft_does(case, tmp_path):
    expected = save_with_peft(tmp_path, *SAVED_BY_PEFT[case])
    lora = read_lora(tmp_path, CONFIG)
    assert not lora.unmatched, lora.unmatched
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert lora.matched == len(tensors)
    assert sum(not torch.equal(expected[key], WEIGHTS[key]) for key in WEIGHTS) >= len(lora.factors) / 3
    same_weights(merge(WEIGHTS, lora), expected, **WIDE)


# -- LyCORIS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LYCORIS_CASES)
def test_merges_as_lycoris_does(case, tmp_path):
    path = tmp_path / "some.safetensors"
    expected = save_with_lycoris(path, *LYCORIS_CASES[case])
    lora = read_lora(path, CONFIG)
    assert not lora.unmatched, lora.unmatched
    assert len(lora.factors) > 20
    assert sum(not torch.equal(expected[key], WEIGHTS[key]) for key in WEIGHTS) >= len(lora.factors) / 3
    same_weights(merge(WEIGHTS, lora), expected, **WIDE)


@pytest.mark.parametrize("algorithm", TWICE)
def test_runs_as_lycoris_does_at_another_scale(algorithm):
    lycoris = pytest.importorskip("lycoris.modules")
    kind = {"loha": lycoris.LohaModule, "lokr": lycoris.LokrModule}[algorithm]
    layer = torch.nn.Linear(48, 192)
    layer.load_state_dict({name: WEIGHTS[f"blocks.0.mlp.fc1.{name}"] for name in ("weight", "bias")})
    module = kind("lycoris_blocks_0_mlp_fc1", layer, lora_dim=4, alpha=2, factor=4)
    randomize(module)
    tensors = {f"lycoris_blocks_0_mlp_fc1.{key}": value for key, value in module.state_dict().items()}
    changed = merge(WEIGHTS, load_lora(tensors, config=CONFIG))
    module.apply_to()
    found = torch.nn.functional.linear(torch.eye(48), changed["blocks.0.mlp.fc1.weight"], layer.bias)
    torch.testing.assert_close(found, module.eval()(torch.eye(48)), **WIDE)


def test_a_norms_difference_is_that_of_lycoris():
    lycoris = pytest.importorskip("lycoris.modules")
    config = replace(CONFIG, qk_norm=True)
    weights = {key: torch.randn(shape) for key, shape in expected_shapes(config).items() if ".q_norm." in key}
    layer = torch.nn.LayerNorm(48)
    layer.load_state_dict({name: weights[f"blocks.0.attn.q_norm.{name}"].clone() for name in ("weight", "bias")})
    module = lycoris.NormModule("lycoris_blocks_0_attn_q_norm", layer, 1.0)
    randomize(module)
    tensors = {f"{module.lora_name}.{key}": value.detach() for key, value in module.state_dict().items()}
    found = merge(weights, load_lora(tensors, config=config))
    x = torch.randn(3, 48)
    changed = (found[f"blocks.0.attn.q_norm.{name}"] for name in ("weight", "bias"))
    torch.testing.assert_close(torch.nn.functional.layer_norm(x, (48,), *changed), module.eval()(x))
    assert not torch.allclose(layer(x), module(x), atol=0.1)


@pytest.mark.parametrize("start", ["principal", "last", "middle"])
def test_merges_as_lycoris_does_its_t_lora(start):
    lycoris = pytest.importorskip("lycoris.modules.tlora")
    name = "blocks.0.attn.proj.weight"
    layer = torch.nn.Linear(48, 48)
    layer.weight.data = WEIGHTS[name].clone()
    module = lycoris.TLoraModule("lycoris_blocks_0_attn_proj", layer, lora_dim=4, alpha=2, sig_type=start)
    randomize(module, 0.02)
    tensors = {f"{module.lora_name}.{key}": value for key, value in module.custom_state_dict().items()}
    lora = load_lora(tensors, config=CONFIG)
    found = merge(WEIGHTS, lora)[name]
    torch.testing.assert_close(found, module.get_merged_weight()[0], **WIDE)
    assert not torch.equal(found, WEIGHTS[name])
    with pytest.raises(ValueError, match=r"T-LoRA of another base: got .*Choose the model that it was trained on"):
        merge({**WEIGHTS, name: WEIGHTS[name].flip(0)}, lora)


def test_the_layers_for_peft_are_diffusers_in_their_order():
    """PEFT draws what it does not save layer by layer."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    models = by_peft._skeleton(expected_shapes(CONFIG)), make_transformer()
    layers = [
        [(name, each.weight.shape) for name, each in model.named_modules() if isinstance(each, kinds)]
        for model in models
    ]
    assert layers[0] == layers[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 10**7}, "Unusable number in adapter_config.json: got 10000000 for 'r'"),
        ({"target_modules": "(.+)+!"}, "Pattern of a LoRA is refused"),
        ({"rank_pattern": {"(.+)+!": 3}}, "another version of PEFT: got HIRA with rank_pattern|Pattern of a LoRA"),
        ({"new_option": 3}, "another version of PEFT: got HIRA with new_option"),
        ({"r": 3}, "Adapter that PEFT does not take: got HIRA"),
        ({"r": "many"}, "Adapter that PEFT does not take: got HIRA"),
        ({"target_modules": ["nothing"]}, "Adapter that PEFT does not take: got HIRA"),
    ],
)
def test_configurations_that_peft_does_not_take(real_files, change, message):
    tensors, config, _ = real_files("hira")
    with pytest.raises(ValueError, match=message):
        load_lora(tensors, {**config, **change}, config=CONFIG)


def test_what_peft_merges_needs_the_package_and_the_model(real_files, monkeypatch):
    tensors, config, _ = real_files("hira")
    with pytest.raises(ValueError, match="Adapter without its model: got HIRA.*Load PixArt LoRA"):
        load_lora(tensors, config)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="the package peft for it. Install it with: pip install peft"):
        load_lora(tensors, config, config=CONFIG)


# -- parts of real files, under other names ---------------------------------------------------------------------------

FUZZED_WITH_PEFT = ("adalora", "biases of all", "whole modules", "ia3", "oft", "vera", "hira", "randlora")
FUZZED_WITH_LYCORIS = (
    "locon",
    "dora",
    "loha",
    "lokr, both in factors",
    "diag-oft with lengths",
    "glora",
    "ia3 by rows",
)
# Roles without which a module is another adapter, as valid as before.
OPTIONAL = ("alpha", "dora_scale", "rescale", "lora_mid", "magnitude")
PREFIXES = ("", "transformer.", "diffusion_model.", "lora_unet_", "base_model.model.", "unet.base_model.model.")


@pytest.fixture(scope="module")
def real_files(tmp_path_factory):
    """case -> (tensors, PEFT's configuration or None, the weights with all of it in them)."""
    made = {}

    def get(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("real")
            if case in SAVED_BY_PEFT:
                weights = save_with_peft(folder, *SAVED_BY_PEFT[case])
                tensors = load_file(folder / "adapter_model.safetensors")
                config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
                made[case] = tensors, config, weights
            else:
                weights = save_with_lycoris(folder / "some.safetensors", *LYCORIS_CASES[case])
                made[case] = load_file(folder / "some.safetensors"), None, weights
        return made[case]

    return get


def mutate(tensors, draw):
    """Some of a file's tensors, some of them under other names. Of OPTIONAL all stay."""
    share, renamed = draw.choice([0, 0.1, 0.5]), {}
    for key, value in tensors.items():
        chance = draw.random()
        if is_optional(key):
            chance = 1
        elif draw.random() < share:
            continue
        if chance < 0.05:
            place = draw.randrange(len(key))
            key = key[:place] + draw.choice("x._") + key[place + 1 :]
        elif chance < 0.1:
            key = key.replace("base_model.model.", draw.choice(PREFIXES))
        elif chance < 0.13:
            value = value.to(torch.int32) if value.ndim else value
        elif chance < 0.16:
            renamed[f"{draw.choice(PREFIXES)}{key}"] = value
        renamed[key] = value
    return renamed


def is_optional(key):
    return any(role in key for role in OPTIONAL)


@pytest.mark.parametrize("case", [*FUZZED_WITH_PEFT, *FUZZED_WITH_LYCORIS])
def test_parts_of_a_file_change_what_it_changes_or_nothing(real_files, case):
    """Rows are as the whole file makes them or as they were, or the file is refused; what is left out is named."""
    tensors, config, whole = real_files(case)
    draw, refused = random.Random(case), 0
    for _ in range(12):
        given = mutate(tensors, draw)
        try:
            lora = load_lora(given, config, config=CONFIG)
        except ValueError as error:
            assert ": got " in str(error) and len(str(error)) < 700
            refused += 1
            continue
        assert lora.matched + len(lora.unmatched) + len(lora.text_encoder) == len(given)
        assert bool(lora.shortfall) >= (lora.matched < len(given))
        if any(map(is_optional, lora.unmatched)):
            continue
        merged = merge(WEIGHTS, lora)
        for name, weight in merged.items():
            rows = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
            same = [(rows - other[name].reshape(rows.shape)).abs().amax(1) < 1e-4 for other in (whole, WEIGHTS)]
            assert bool((same[0] | same[1]).all()), name
    assert refused < 12
