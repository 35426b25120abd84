"""The command that trains, as far as it is not the training itself."""

import signal

import pytest
import torch
from tqdm import tqdm

from pixart_pack.pixart.commands.train import _Bar, compile_for_training
from pixart_pack.pixart.data.examples import collate
from pixart_pack.pixart.training.build import make_objective
from pixart_pack.pixart.training.draws import draw_batch
from pixart_pack.pixart.training.loop import Trainer
from pixart_pack.pixart.training.processes import SingleProcess
from pixart_pack.tests.training_data import make_features, tiny_model, tiny_settings


def test_signals_are_given_back_after_a_training():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with tqdm(disable=True) as bar, _Bar(bar) as events:
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == events._stop
        signal.raise_signal(signal.SIGTERM)
        assert events.should_stop()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def gradients(settings, **compiling):
    """Of every trained weight, and the loss, over two batches of other sizes; and the model's CompiledBlocks."""
    model = tiny_model(depth=2)
    if compiling:
        compile_for_training(model, settings, SingleProcess("cpu"), **compiling)
    objective, blocks = make_objective(model, settings), model.compiled
    generator = torch.Generator().manual_seed(3)
    trained = {name: weight for name, weight in objective.named_parameters() if weight.requires_grad}
    for weight in trained.values():
        weight.data.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    losses = []
    for size in ((8, 8), (6, 10)):
        features = make_features(count=2, sizes=(size,), hint=settings.kind == "controlnet")
        batch = collate([features[index] for index in range(2)])
        loss = objective(batch, draw_batch(settings, 0, range(2), batch.latent.shape[1:]))[0]
        loss.backward()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses), **{name: each.grad for name, each in trained.items()}}, blocks


@pytest.mark.slow
def test_gradients_of_a_compiled_training_are_those_of_the_uncompiled():
    settings = tiny_settings(kind="controlnet", control_blocks=1)
    (plain, _), (found, blocks) = gradients(settings), gradients(settings, backend="aot_eager")
    assert not blocks.failed and blocks._compiled and plain.keys() == found.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-4)  # float32, sums in another order


@pytest.mark.slow
def test_a_compiled_training_goes_on_to_the_bit(tmp_path):
    def train(folder, *stops, compiles=True):
        for steps in stops:
            settings, model = tiny_settings(steps=steps), tiny_model(depth=2)
            if compiles:
                compile_for_training(model, settings, SingleProcess("cpu"), backend="aot_eager")
            objective = make_objective(model, settings)
            trainer = Trainer(
                objective, make_features(sizes=((8, 8),)), settings, tmp_path / folder, SingleProcess("cpu")
            )
            trainer.run()
        return {name: each.clone() for name, each in trainer.trained_weights().items()}

    whole, continued = train("whole", 2), train("continued", 1, 2)
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    for name, weight in train("plain", 2, compiles=False).items():
        torch.testing.assert_close(whole[name], weight, atol=1e-4, rtol=0)  # Adam divides by small numbers


def test_a_training_without_a_compiler_says_so_and_goes_on(monkeypatch):
    monkeypatch.setattr("pixart_pack.pixart.commands.train.try_compiler", lambda _: "PixArt runs uncompiled: ...")
    model = tiny_model(depth=2)
    compile_for_training(model, tiny_settings(), SingleProcess("cpu"))
    assert model.compiled is None


@pytest.mark.parametrize("fields", [{"dropout": 0.1}, {"checkpointing": "on"}, {"base_dtype": "fp8"}, {"dora": True}])
def test_what_cannot_be_compiled_is_refused(fields):
    with pytest.raises(ValueError, match=f"Training cannot be compiled: got {next(iter(fields))} "):
        compile_for_training(tiny_model(depth=2), tiny_settings(**fields), SingleProcess("cpu"))
