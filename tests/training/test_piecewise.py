"""Steps of one weight at a time: the same weights, with one gradient and with states that wait elsewhere."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pixart_pack.pixart.training.build import make_objective
from pixart_pack.pixart.training.loop import Trainer
from pixart_pack.pixart.training.memory.piecewise import Piecewise
from pixart_pack.pixart.training.report import LOG, read_log
from pixart_pack.pixart.training.run import train
from pixart_pack.pixart.training.sanity import TrainingDiverged
from pixart_pack.pixart.training.settings import TrainingSettings
from pixart_pack.tests.training_data import StopAt, make_features, tiny_model, tiny_settings

MODES = {
    "released": {"gradient_release": True},
    "offloaded": {"offload_optimizer": True},
    "both": {"gradient_release": True, "offload_optimizer": True},
}


def norms(folder):
    return [entry["gradient_norm"] for entry in read_log(folder / LOG)]


@pytest.mark.parametrize("mode", MODES)
def test_the_weights_are_those_of_whole_steps_and_go_on_bit_by_bit(mode, tmp_path):
    fields = {"steps": 3, "clip_norm": 0.0, "lora_plus": 2.0, "dropout": 0.1, "schedule": "linear"}
    plain = train(tiny_model(), make_features(), tiny_settings(**fields), tmp_path / "plain")
    settings = tiny_settings(**fields, **MODES[mode])
    train(tiny_model(), make_features(), settings, tmp_path / "cut", events=StopAt(2))
    cut = train(tiny_model(), make_features(), settings, tmp_path / "cut")
    assert all(torch.equal(value, cut.weights[name]) for name, value in plain.weights.items())
    assert norms(tmp_path / "plain") == pytest.approx(norms(tmp_path / "cut"), rel=1e-5)  # sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "came"])
@pytest.mark.parametrize("kind", ["full", "controlnet"])
def test_whole_models_and_other_optimizers_are_trained_the_same(optimizer, kind, tmp_path):
    pytest.importorskip({"lion": "lion_pytorch", "came": "came_pytorch"}.get(optimizer, "torch"))
    fields = {"kind": kind, "steps": 3, "clip_norm": 0.0, "optimizer": optimizer, "checkpointing": "on"}
    features = make_features(hint=True)
    plain = train(tiny_model(), features, tiny_settings(**fields), tmp_path / "plain")
    both = train(tiny_model(), features, tiny_settings(**fields, **MODES["both"]), tmp_path / "both")
    assert all(torch.equal(value, both.weights[name]) for name, value in plain.weights.items())


def test_no_two_gradients_are_there_at_a_time(tmp_path):
    settings = tiny_settings(kind="full", steps=1, clip_norm=0.0, gradient_release=True)
    made = Trainer(make_objective(tiny_model(), settings), make_features(), settings, tmp_path)
    seen = []
    for parameter in made.parameters.values():
        parameter.register_hook(lambda _: seen.append(sum(p.grad is not None for p in made.parameters.values())))
    made.run()
    assert len(seen) == len(made.parameters) and max(seen) == 0
    assert all(parameter.grad is None for parameter in made.parameters.values())


class Sum(torch.optim.Optimizer):
    """Follows the sum of all gradients, and notes where its states are in each step."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.places = []

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            total = self.state[parameter].setdefault("total", torch.zeros_like(parameter))
            self.places.append([state["total"].device.type for state in self.state.values()])
            parameter.data.sub_(total.add_(parameter.grad))


def test_states_wait_on_the_cpu_and_come_for_their_own_step_alone():
    """On the tensors without numbers that stand for a GPU's."""
    with FakeTensorMode():
        weights = [torch.nn.Parameter(torch.empty(8, 8, device="cuda")) for _ in range(3)]
        optimizer = Sum(weights)
        made = Piecewise(optimizer, weights, is_released=False, is_offloaded=True)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.empty(8, 8, device="cuda")
            made.step()
        assert optimizer.places[2] == ["cpu", "cpu", "cuda"] and optimizer.places[4] == ["cpu", "cuda", "cpu"]
        assert {state["total"].device.type for state in optimizer.state.values()} == {"cpu"}
    assert len(optimizer.param_groups[0]["params"]) == 3


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(tmp_path, monkeypatch):
    settings = tiny_settings(steps=2, clip_norm=0.0, gradient_release=True)
    made = Trainer(make_objective(tiny_model(), settings), make_features(), settings, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in made.parameters.items()}
    forward = type(made.objective).forward

    def broken(self, *args):
        loss = forward(self, *args)
        return loss._replace(total=loss.total * math.nan)

    monkeypatch.setattr(type(made.objective), "forward", broken)
    with pytest.raises(TrainingDiverged, match="Loss is not a number"):
        made.run()
    assert all(torch.equal(parameter, before[name]) for name, parameter in made.parameters.items())


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"gradient_release": True}, "gradient_release with clip_norm 1, expected"),
        ({"gradient_release": True, "clip_norm": 0.0, "accumulation": 2}, "gradient_release with accumulation 2"),
        ({"offload_optimizer": True, "optimizer": "prodigy", "learning_rate": 1.0}, "with optimizer prodigy, expected"),
        ({"offload_optimizer": True, "dtype": "fp16"}, "offload_optimizer with dtype fp16"),
    ],
)
def test_what_excludes_it_is_refused_by_name(fields, match):
    with pytest.raises(ValueError, match=match):
        TrainingSettings(**fields)
