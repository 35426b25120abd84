"""Optimisers: averages of schedule-free ones, LoRA+ rates, and what goes with what."""

import pytest
import torch
from torch import nn

from pixart_pack.pixart.training.optimizers import as_result, make_optimizer, set_rate
from pixart_pack.pixart.training.run import train
from pixart_pack.pixart.training.settings import TrainingSettings
from pixart_pack.tests.training_data import StopAt, make_features, tiny_model, tiny_settings


def test_a_schedule_free_result_is_its_average_and_looking_at_it_changes_nothing():
    schedulefree = pytest.importorskip("schedulefree")
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(7)), nn.Parameter(torch.zeros(7))
    theirs.data.copy_(ours)
    settings = tiny_settings(optimizer="schedulefree", learning_rate=0.05, weight_decay=0.01)
    made = make_optimizer(settings, {"a": ours})
    other = schedulefree.AdamWScheduleFree([theirs], lr=0.05, weight_decay=0.01)
    other.train()
    for step in range(4):
        set_rate(made, 0.05)
        for optimizer, parameter in ((made, ours), (other, theirs)):
            optimizer.zero_grad()
            (parameter - step).square().sum().backward()
            optimizer.step()
        before = ours.detach().clone()
        with as_result(made):
            seen = ours.detach().clone()
        assert torch.equal(ours, before) and torch.equal(before, theirs)
    assert made.param_groups[0]["train_mode"]
    other.eval()
    assert torch.equal(seen, theirs) and not torch.equal(seen, before)


@pytest.mark.slow
def test_a_schedule_free_training_is_validated_sampled_and_cut_bit_by_bit(tmp_path):
    pytest.importorskip("schedulefree")
    settings = tiny_settings(optimizer="schedulefree", steps=4, warmup_steps=2, validation_every=1)
    plain = train(tiny_model(), make_features(), settings, tmp_path / "plain")
    train(tiny_model(), make_features(), settings, tmp_path / "cut", held_out=make_features(2), events=StopAt(2))
    cut = train(tiny_model(), make_features(), settings, tmp_path / "cut", held_out=make_features(2))
    assert all(torch.equal(value, cut.weights[name]) for name, value in plain.weights.items())


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "schedulefree"])
def test_lora_plus_is_the_rate_of_the_second_matrix_alone(optimizer):
    if optimizer == "schedulefree":
        pytest.importorskip("schedulefree")
    named = {name: nn.Parameter(torch.ones(3, 3)) for name in ("a.lora_down", "a.lora_up", "a.dora_scale")}
    made = make_optimizer(tiny_settings(optimizer=optimizer, lora_plus=8.0), named)
    set_rate(made, 1e-3)
    rates = {id(parameter): group["lr"] for group in made.param_groups for parameter in group["params"]}
    assert [rates[id(parameter)] for parameter in named.values()] == [1e-3, 8e-3, 1e-3]
    for parameter in named.values():
        parameter.grad = torch.full((3, 3), 0.1)
    made.step()
    moved = [(1 - parameter).abs().mean().item() for parameter in named.values()]
    assert moved[0] == moved[2] and moved[1] > 2 * moved[0]
    assert len(make_optimizer(tiny_settings(optimizer=optimizer), named).param_groups) == 1


def test_adafactor_keeps_rows_and_columns_in_place_of_a_number_for_each_weight():
    weight = nn.Parameter(torch.ones(64, 32))
    made = make_optimizer(tiny_settings(optimizer="adafactor"), {"a": weight})
    weight.grad = torch.ones(64, 32)
    made.step()
    assert sum(value.numel() for value in made.state[weight].values()) < 100


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"optimizer": "schedulefree", "schedule": "cosine"},
            "Schedule-free optimiser with a schedule: .*'cosine'",
        ),
        ({"optimizer": "schedulefree", "ema_decay": 0.9}, "Schedule-free .* ema_decay 0.9"),
        ({"optimizer": "prodigy", "learning_rate": 1.0, "lora_plus": 4.0}, "LoRA\\+ cannot be had here: .*'prodigy'"),
        ({"kind": "full", "lora_plus": 4.0}, "LoRA\\+ cannot be had here: .*'full'"),
    ],
)
def test_what_excludes_each_other_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        TrainingSettings(**fields)
