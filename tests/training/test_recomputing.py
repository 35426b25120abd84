"""What is computed again in the backward pass, or cast once for all: the same gradients, and less kept for them."""

import pytest
import torch

from pixart_pack.pixart.training.adapters import AdaptedLinear, tell_chances
from pixart_pack.pixart.training.build import make_objective
from pixart_pack.pixart.training.draws import Chances
from pixart_pack.pixart.training.settings import CHECKPOINTING, TrainingSettings, settings_from_dict
from pixart_pack.tests.training.test_adapters import one_batch, randomize
from pixart_pack.tests.training_data import make_features, tiny_model, tiny_settings

SIGMA = {"variant": "sigma-1024", "qk_norm": True, "kv_compress_ratio": 2, "kv_compress_layers": (1,)}
CASES = {
    "attention in bf16": ({"dtype": "bf16"}, {}),
    "blocks in bf16": ({"dtype": "bf16", "targets": "blocks"}, {}),
    "8 bits": ({"dtype": "bf16", "targets": "blocks", "base_dtype": "fp8"}, {}),
    "one layer": ({"targets": "custom", "target_pattern": r"blocks\.2\.mlp\.fc2"}, {}),
    "DoRA and dropout": ({"targets": "all-linear", "dora": True, "dropout": 0.3}, {}),
    "Sigma with compression": ({"targets": "blocks", "dtype": "bf16"}, SIGMA),
    "whole model": ({"kind": "full"}, {}),
    "whole model under autocast": ({"kind": "full", "dtype": "bf16"}, SIGMA),
    "ControlNet": ({"kind": "controlnet", "dtype": "bf16"}, {}),
    "LCM-LoRA": ({"kind": "lcm_lora", "dtype": "bf16"}, {}),
    "DMD": ({"kind": "dmd", "dmd_fake": "full", "dtype": "bf16"}, {}),
}


def gradients(settings, fields, prepare=None):
    """Of every trained number, after one pass."""
    objective = make_objective(tiny_model(**fields), settings).train()
    randomize(objective)
    if prepare is not None:
        prepare(objective)
    batch, draws = one_batch(settings, make_features(count=4, sizes=((8, 12),), hint=settings.kind == "controlnet"))
    if settings.dropout:
        tell_chances(objective, Chances("0 7", range(len(batch))))
    with torch.autocast("cpu", objective.dtype, enabled=objective.autocast):
        loss = objective(batch, draws).total
    loss.backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    assert found.keys() == expected.keys() and expected
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("fields, model", CASES.values(), ids=CASES)
def test_gradients_are_the_same_bit_for_bit_whatever_is_computed_again(fields, model):
    """The same kernels on the same numbers."""
    off, *others = (gradients(tiny_settings(**fields, checkpointing=mode), model) for mode in CHECKPOINTING)
    for found in others:
        assert_equal(found, off)


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("fields", [{}, pytest.param({"dora": True}, marks=pytest.mark.slow)], ids=["lora", "dora"])
def test_factors_that_are_cast_together_give_the_gradients_of_single_casts(fields, mode):
    def cast_singly(objective):
        for module in objective.modules():
            if isinstance(module, AdaptedLinear):
                module.casts = None

    settings = tiny_settings(dtype="bf16", targets="custom", target_pattern=".*", checkpointing=mode, **fields)
    assert_equal(gradients(settings, {}), gradients(settings, {}, cast_singly))


def test_factors_of_a_pass_serve_it_alone():
    """After an update, and after a pass that failed, the next one reads what the weights are then."""
    settings = tiny_settings(dtype="bf16")
    objective = make_objective(tiny_model(), settings).train()
    randomize(objective)
    batch, draws = one_batch(settings)
    first = objective(batch, draws).total
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if "lora" in name:
                parameter.mul_(2)
    casts = next(module.casts for module in objective.modules() if isinstance(module, AdaptedLinear))
    assert casts.held is None and not torch.equal(objective(batch, draws).total, first)
    with pytest.raises(ValueError, match="Caption width mismatch"):
        objective.model(torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16), torch.zeros(1), torch.zeros(1, 3, 5))
    assert casts.held is None


def test_the_setting_takes_what_it_took_before():
    modes = [settings_from_dict({"checkpointing": given}).checkpointing for given in (True, False, "selective")]
    assert modes == ["on", "off", "selective"] and TrainingSettings().checkpointing == "off"
    with pytest.raises(ValueError, match="Unknown checkpointing: got 'some', expected one of off, selective, on"):
        tiny_settings(checkpointing="some")
    with pytest.raises(ValueError, match="wrong kind: got checkpointing = 1"):
        tiny_settings(checkpointing=1)
