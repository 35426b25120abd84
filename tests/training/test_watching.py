"""How a training goes: the loss on pictures that it does not see, early ends, the best state, errors by timestep."""

import json
import math

import numpy as np
import pytest
import torch

from pixart_pack.pixart.data.buckets import BucketSampler
from pixart_pack.pixart.lora import read_lora
from pixart_pack.pixart.training.build import make_objective
from pixart_pack.pixart.training.loop import Trainer
from pixart_pack.pixart.training.processes import SingleProcess
from pixart_pack.pixart.training.report import LOG, read_log
from pixart_pack.pixart.training.run import choose_folder, train
from pixart_pack.pixart.training.validation import ValidationPrompt
from pixart_pack.pixart.training.watching.best import Best, read_best
from pixart_pack.pixart.training.watching.held_out import TIMES, HeldOut, choose_held_out
from pixart_pack.pixart.training.watching.timesteps import BINS, ByTimestep, by_timestep
from pixart_pack.tests.training_data import StopAt, make_features, tiny_model, tiny_settings

CPU = SingleProcess()


def validations(folder):
    return {entry["step"]: entry["validation_loss"] for entry in read_log(folder / LOG) if "validation_loss" in entry}


def test_pictures_held_out_are_never_trained_on_and_priors_never_held_out():
    features = make_features(20, prior=range(12, 20))
    held = choose_held_out(features, 0.25, seed=3)
    assert len(held) == 3 and max(held) < 12 and held.tolist() == choose_held_out(features, 0.25, 3).tolist()
    sampler = BucketSampler(features.bins, 2, is_prior=features.is_prior, held_out=held)
    shown = [index for _ in range(2 * sampler.batches_per_epoch) for index in next(sampler)]
    assert set(shown) == set(range(20)) - set(held.tolist())
    for share, count in ((0.5, 2), (0.01, 1), (0.5, 1)):
        if count == 1 and share == 0.5:
            with pytest.raises(ValueError, match="Nothing left to train on: got 1 pictures with a validation share"):
                choose_held_out(make_features(1), share, 0)
        else:
            assert len(choose_held_out(make_features(4), share, 0)) == count


def test_of_a_stream_as_few_shards_as_it_takes_are_held_out():
    features = make_features(12)
    features.blocks = np.repeat(np.arange(4), 3)
    assert len(set(features.blocks[choose_held_out(features, 0.25, 1)])) == 1


def test_the_validation_loss_is_the_mean_over_all_at_fixed_noise_whatever_the_batch():
    features = make_features(5)
    settings = tiny_settings(caption_dropout=1.0, noise_offset=0.5, dropout=0.5)
    objective = make_objective(tiny_model(), settings).eval()
    found = [HeldOut(features, None, tiny_settings(batch_size=size)).measure(objective, None, CPU) for size in (1, 3)]
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)  # float32 in batches of other sizes
    assert found[0] == HeldOut(features, None, tiny_settings(batch_size=1)).measure(objective, None, CPU)
    held = HeldOut(features, None, settings)
    draws = held._draws(range(5), 2, (4, 8, 8), None)
    assert all(500 <= step < 750 for step in draws.timestep.tolist()) and not draws.dropped.any() and TIMES == 4
    with pytest.raises(ValueError, match="No loss to validate: got kind 'dmd_lora'"):
        HeldOut(features, None, tiny_settings(kind="dmd_lora"))


@pytest.mark.parametrize("fields", [{}, {"ema_decay": 0.9}], ids=["plain", "averaged"])
def test_validating_changes_no_training_and_goes_on_as_if_never_cut(fields, tmp_path):
    other = make_features(4, seed=9)
    settings = tiny_settings(steps=4, validation_every=2, dropout=0.1, **fields)
    plain = train(tiny_model(), make_features(), settings, tmp_path / "plain").weights
    whole = train(tiny_model(), make_features(), settings, tmp_path / "whole", held_out=other)
    train(tiny_model(), make_features(), settings, tmp_path / "cut", held_out=other, events=StopAt(3))
    cut = train(tiny_model(), make_features(), settings, tmp_path / "cut", held_out=other)
    assert all(torch.equal(value, plain[name]) and torch.equal(value, cut.weights[name]) for name, value in
               whole.weights.items())  # fmt: skip
    assert validations(tmp_path / "whole") == validations(tmp_path / "cut")
    assert sorted(validations(tmp_path / "whole")) == [0, 2, 4]
    assert whole.notes[1] == cut.notes[1] and whole.notes[1].startswith("validation loss")


def test_a_training_ends_early_keeps_its_best_state_and_compares_both(tmp_path, monkeypatch):
    features, events = make_features(), StopAt()
    losses = iter([4.0, 3.0, 3.5, 3.6, 9.0])

    def measured(self, *_):
        return type("Measured", (), {"loss": next(losses), "by_timestep": (None, *[1.0] * (BINS - 1))})

    monkeypatch.setattr(HeldOut, "measure", measured)
    settings = tiny_settings(validation_share=0.2, validation_every=2, patience=2, steps=20, sample_every=20,
                             sample_steps=1)  # fmt: skip
    folder = choose_folder(tmp_path, "run", True, 20)
    prompts = [ValidationPrompt(features[0].caption, features.bins[0], text="a")]
    result = train(tiny_model(), features, settings, folder, events=events, prompts=prompts,
                   decode=lambda latent: latent[:, :3].movedim(1, -1).sigmoid())  # fmt: skip
    assert (result.step, result.is_done) == (6, True)
    assert events.seen[3].validation == (4, 3.5) and events.seen[3].best == (2, 3.0)
    assert any("ended early: no lower validation loss after step 2" in note for note in result.notes)
    best = read_lora(result.file.with_stem("run_001_best"))
    kept = read_best(folder)
    assert (kept["step"], kept["loss"]) == (2, 3.0) and best.factors.keys() == read_lora(result.file).factors.keys()
    assert not all(torch.equal(value, result.weights[name]) for name, value in kept["parameters"].items())
    assert (folder / "best.png").is_file() and (folder / "timesteps.png").is_file()
    assert json.loads((folder / "result.json").read_text()) | {"file": ""} == {"step": 20, "file": "", "stops": 0}
    assert choose_folder(tmp_path, "run", True, 20).name == "run_002"
    with (folder / "best.pt").open("r+b") as file:
        file.seek(-3000, 2)
        file.write(b"\xff" * 100)
    assert read_best(folder) is None


def test_the_best_is_the_lowest_and_the_first_of_equals():
    best = Best()
    assert [best.follow(step, loss) for step, loss in enumerate((3.0, 2.0, 2.0, math.nan))] == [
        True,
        True,
        False,
        False,
    ]
    assert best.state() == {"loss": 2.0, "step": 1, "since": 2}


def test_errors_by_timestep_are_sums_of_their_bins(tmp_path):
    sums = by_timestep(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 99, 999]))
    assert sums[0].tolist() == [3.0, *[0.0] * 8, 4.0] and sums[1].tolist() == [2.0, *[0.0] * 8, 1.0]
    course = ByTimestep()
    assert course.close() is None
    for factor in (1, 2):
        course.add((sums * factor).flatten().tolist())
    assert ByTimestep(course.state()).close() == course.close() == [1.5, *[None] * 8, 4.0]
    made = Trainer(make_objective(tiny_model(), tiny_settings()), make_features(), tiny_settings(), tmp_path)
    made.run()
    (entry,) = [entry for entry in read_log(tmp_path / LOG) if "error_by_timestep" in entry]
    errors = [entry["error"] for entry in read_log(tmp_path / LOG) if "error" in entry]
    known = [error for error in entry["error_by_timestep"] if error is not None]
    assert entry["step"] == 6 and min(known) <= sum(errors) / 6 <= max(known)
    first = read_log(tmp_path / LOG)[0]
    assert first["pictures_per_second"] > 0 and first["memory_gb"] > 0 and first["seconds_left"] > 0
    assert made.report.timestep_bars().size == (768, 320)
