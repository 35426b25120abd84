"""LoHa, LoKr and OFT as they are trained: gradients, files, and what LyCORIS and PEFT make of them."""

import pytest
import torch
from torch import nn

from pixart_pack.pixart.lora import export_lora, merge, read_lora
from pixart_pack.pixart.training.adapting.kinds import KINDS, factorize
from pixart_pack.pixart.training.build import make_objective
from pixart_pack.pixart.training.run import lora_factors, save_result, train
from pixart_pack.pixart.training.settings import TrainingSettings
from pixart_pack.tests.training_data import make_features, predict, tiny_model, tiny_settings

CASES = {
    "loha": {"adapter": "loha", "alpha": 3.0},
    "lokr": {"adapter": "lokr", "rank": 1, "alpha": 0.5},
    "lokr with two whole matrices": {"adapter": "lokr", "rank": 16, "lokr_factor": 2},
    "oft": {"adapter": "oft", "rank": 4},
}


def randomize(objective, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def made(fields):
    settings = tiny_settings(**{"targets": "blocks", **fields})
    objective = make_objective(tiny_model(), settings)
    before = predict(objective.model, objective)
    torch.testing.assert_close(before, predict(tiny_model(), objective), rtol=1e-4, atol=1e-5)  # float32
    randomize(objective)
    return objective, settings


@pytest.mark.parametrize("name", CASES)
def test_a_file_merged_into_the_weights_is_the_trained_model(name, tmp_path):
    objective, settings = made(CASES[name])
    weights = {key: value.detach().clone() for key, value in objective.named_parameters() if value.requires_grad}
    save_result(tmp_path / "file.safetensors", objective, weights, settings)
    lora = read_lora(tmp_path / "file.safetensors", objective.model.config)
    assert not lora.unmatched and {factor.kind.lower() for factor in lora.factors.values()} == {settings.adapter}
    plain = tiny_model()
    plain.load_state_dict(merge(plain.state_dict(), lora))
    adapted = predict(objective.model, objective)
    assert not torch.allclose(adapted, predict(tiny_model(), objective), atol=1e-2)
    torch.testing.assert_close(predict(plain, objective), adapted, rtol=1e-4, atol=2e-5)  # float32, other orders


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_are_those_of_the_changed_weight(name, parts):
    torch.manual_seed(0)
    settings = TrainingSettings(**{"rank": 2, **CASES[name]})
    layer = KINDS[settings.adapter](nn.Linear(12, 8 * parts).requires_grad_(False), settings, parts).double()
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    layer.activated = parts == 1
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    given = nn.functional.gelu(x, approximate="tanh") if layer.activated else x
    inner = dict(layer.named_parameters(recurse=False))
    weight = torch.cat([
        factor.apply(rows) for factor, rows in
        zip(layer.changes("", inner).values(), layer.base.weight.chunk(parts), strict=True)
    ])  # fmt: skip
    out = layer(x)
    tolerance = 1e-6 if name == "oft" else 1e-12  # rotations are made in float32
    torch.testing.assert_close(out, nn.functional.linear(given, weight, layer.base.bias), rtol=0, atol=tolerance)
    wanted = torch.autograd.grad(nn.functional.linear(given, weight, layer.base.bias).sin().sum(), [x, *inner.values()])
    found = torch.autograd.grad(out.sin().sum(), [x, *inner.values()])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_lycoris_merges_the_same(name):
    modules = pytest.importorskip("lycoris.modules")
    objective, _ = made(CASES[name])
    model = tiny_model()
    factors = lora_factors(objective, dict(objective.named_parameters()))
    for target, factor in list(factors.items())[2:6]:
        tensors, _ = export_lora({target: factor})
        named = {f"x.{key.rpartition('.')[2]}": value.detach() for key, value in tensors.items()}
        weight = model.get_parameter(target.name).detach()
        rows = weight[target.rows(len(weight))]
        layer = nn.Linear(rows.shape[1], len(rows))
        layer.weight.data.copy_(rows)
        module = modules.make_module(*modules.get_module(named, "x"), "x", layer)
        # What it trains and computes with; its own merging counts the scale of LoHa and LoKr twice.
        is_added = hasattr(module, "get_weight")
        merged = rows + module.get_weight(rows.shape) if is_added else module.get_merged_weight(1.0)[0]
        merged = merged.detach()
        torch.testing.assert_close(merged, factor.apply(rows).detach(), rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loha", "lokr", "oft"])
def test_they_learn_and_go_on_bit_by_bit(name, tmp_path):
    settings = tiny_settings(**{**CASES[name], "steps": 4})
    if name != "oft":
        settings = tiny_settings(**{**CASES[name], "steps": 4, "dropout": 0.1})
    whole = train(tiny_model(), make_features(), settings, tmp_path / "whole")
    train(tiny_model(), make_features(), tiny_settings(**{**CASES[name], "steps": 2, "dropout": settings.dropout}),
          tmp_path / "cut")  # fmt: skip
    cut = train(tiny_model(), make_features(), settings, tmp_path / "cut")
    assert all(torch.equal(value, cut.weights[key]) for key, value in whole.weights.items())
    changed = [key for key, value in whole.weights.items() if value.abs().max() > 0]
    assert len(changed) == len(whole.weights)


def test_sizes_are_cut_as_lycoris_does():
    from_lycoris = {(1152, 8): (8, 144), (1152, 0): (32, 36), (1152, 16): (16, 72), (12, 5): (3, 4), (7, 4): (1, 7)}
    assert {key: factorize(*key) for key in from_lycoris} == from_lycoris


@pytest.mark.parametrize(
    "fields",
    [{"adapter": "loha", "dora": True}, {"adapter": "oft", "dropout": 0.1}, {"adapter": "lokr", "kind": "full"},
     {"adapter": "lokr", "lora_plus": 4.0}],
)  # fmt: skip
def test_what_lora_alone_has_is_refused(fields):
    with pytest.raises(ValueError, match="Adapter of another kind: got '(loha|oft|lokr)' with"):
        TrainingSettings(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loha", "lokr", "lokr with two whole matrices"])
def test_peft_merges_the_same(name, tmp_path):
    """The file's tensors under the names that PEFT gives its own, in a model of its layers."""
    peft = pytest.importorskip("peft")
    objective, settings = made(CASES[name])
    factors = lora_factors(objective, dict(objective.named_parameters()))
    model, chosen = tiny_model(), dict(list(factors.items())[2:6])
    layers = {}
    for target in chosen:
        weight = model.get_parameter(target.name).detach()
        rows = weight[target.rows(len(weight))]
        layers[target.diffusers_module.replace(".", "_")] = nn.Linear(rows.shape[1], len(rows), bias=False)
        layers[target.diffusers_module.replace(".", "_")].weight.data.copy_(rows)
    before = {key: layer.weight.detach().clone() for key, layer in layers.items()}
    kind = peft.LoHaConfig if settings.adapter == "loha" else peft.LoKrConfig
    options = {} if settings.adapter == "loha" else {"decompose_factor": settings.lokr_factor or -1}
    # PEFT scales two whole matrices by alpha over rank as well, LyCORIS and this pack by 1.
    alpha = settings.rank if "whole" in name else settings.alpha
    config = kind(r=settings.rank, alpha=alpha, target_modules=list(layers), **options)
    other = peft.get_peft_model(nn.ModuleDict(layers), config)
    own = {}
    for target, factor in chosen.items():
        tensors, _ = export_lora({target: factor})
        module = f"base_model.model.{target.diffusers_module.replace('.', '_')}"
        parts = ((key.rpartition(".")[2], value) for key, value in tensors.items())
        own |= {f"{module}.{part}": value.detach() for part, value in parts if part != "alpha"}
    missing = peft.set_peft_model_state_dict(other, own)
    assert not missing.unexpected_keys
    merged = other.merge_and_unload()
    for target, factor in chosen.items():
        key = target.diffusers_module.replace(".", "_")
        expected = factor.apply(before[key]).detach()
        torch.testing.assert_close(merged[key].weight.detach(), expected, rtol=1e-4, atol=1e-5)  # float32
