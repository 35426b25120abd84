"""Settings: what is refused before any work, and the way to a file and back."""

import math
import time

import pytest

from pixart_pack.pixart.training.optimizers import rate_factor
from pixart_pack.pixart.training.run import check_name, choose_folder
from pixart_pack.pixart.training.settings import (
    RunConfig,
    TrainingSettings,
    parse_settings,
    read_config,
    settings_from_dict,
    settings_to_dict,
    write_config,
)
from pixart_pack.tests import hostile_texts


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"rank": 0}, "Rank is out of range: got 0, expected a LoRA rank from 1"),
        ({"learning_rate": 0.0}, "Learning rate is out of range: got 0, expected more than 0"),
        ({"learning_rate": -1e-4}, "Learning rate is out of range"),
        ({"learning_rate": 3.0}, "Learning rate is out of range: got 3, .* Usual is 1e-4 for a LoRA"),
        ({"learning_rate": math.nan}, "Learning rate is out of range: got nan"),
        ({"learning_rate": 0.05, "optimizer": "lion"}, "at most 0.01 with lion"),
        ({"steps": 0}, "Steps is out of range: got 0"),
        ({"batch_size": 0}, "Batch size is out of range"),
        ({"caption_dropout": 1.5}, "Caption dropout is out of range"),
        ({"kind": "textual inversion"}, "Unknown kind: got 'textual inversion', expected one of lora"),
        ({"optimizer": "sgd"}, "Unknown optimizer"),
        ({"timestep_min": 500, "timestep_max": 100}, "Timestep range is empty"),
        ({"timestep_weights": [[1000, 1]]}, "Timestep weight is out of range"),
        ({"targets": "custom"}, "Target pattern is missing"),
        ({"targets": "custom", "target_pattern": "("}, "no usable regular expression"),
        ({"kind": "lcm", "lcm_steps": 7}, "do not divide"),
        ({"rank": "many"}, "wrong kind: got rank = 'many', expected int"),
        ({"rank": 1.5}, "wrong kind"),
        ({"dora": 1}, "wrong kind: got dora = 1, expected bool"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        TrainingSettings(**fields)


def test_prodigy_has_its_own_learning_rate():
    assert TrainingSettings(optimizer="prodigy", learning_rate=1.0).learning_rate == 1.0


def test_numbers_of_yaml_are_taken_as_they_are_meant():
    settings = settings_from_dict({"learning_rate": "1e-4", "rank": 8.0, "clip_norm": 1})
    assert settings.learning_rate == 1e-4 and settings.rank == 8 and isinstance(settings.clip_norm, float)
    with pytest.raises(ValueError, match="Unknown settings: got learning_rat, expected"):
        settings_from_dict({"learning_rat": 1e-4})


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_a_configuration_comes_back_from_its_file(name, tmp_path):
    settings = TrainingSettings(kind="lcm_lora", timestep_weights=[[0, 1.0], [999, 0.5]], learning_rate=3e-5)
    config = RunConfig("models/a.pth", "/data/übung", settings, name="größe", resume=False)
    write_config(tmp_path / name, config)
    found = read_config(tmp_path / name)
    assert found.settings == settings and settings_from_dict(settings_to_dict(settings)) == settings
    assert found.model == str(tmp_path / "models/a.pth") and found.features == "/data/übung"
    assert (found.name, found.resume, found.validation) == ("größe", False, None)


@pytest.mark.parametrize(
    "text, match",
    [
        ("model: a\nfeatures: b\nmodle: c", "unknown \\['modle'\\]"),
        ("features: b", "without \\['model'\\]"),
        ("[1, 2]", "is no mapping"),
        ("a: [", "cannot be read"),
        ("model: a\nfeatures: b\nsettings: {rank: 0}", "Rank is out of range"),
    ],
)
def test_a_broken_configuration_is_refused(text, match, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=match):
        read_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("name", hostile_texts.SETTINGS)
def test_settings_that_mean_harm_are_refused_in_few_words(name, tmp_path):
    """337 bytes of YAML made an error of 58 megabytes."""
    text = hostile_texts.SETTINGS[name]
    (tmp_path / "run.yaml").write_text("model: a\nfeatures: b\nsettings:\n  " + text.replace("\n", "\n  "))
    start = time.perf_counter()
    for read in (lambda: parse_settings(text, {}), lambda: read_config(tmp_path / "run.yaml")):
        with pytest.raises(ValueError) as caught:
            read()
        assert len(str(caught.value)) < 1800 and ". " in str(caught.value)  # the names of all settings are 1100
    assert time.perf_counter() - start < 3


def test_values_of_another_kind_are_named(tmp_path):
    (tmp_path / "run.yaml").write_text("model: 3\nfeatures: [b]")
    with pytest.raises(ValueError, match=r"got model: 3, features: \['b'\] in"):
        read_config(tmp_path / "run.yaml")
    with pytest.raises(ValueError, match="Timestep weights cannot be read: got 3"):
        parse_settings("timestep_weights: 3", {})


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="Configuration not found"):
        read_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "", "..", " x", "c:d", "x" * 200, "nul\0"])
def test_names_never_leave_their_folder(name, tmp_path):
    with pytest.raises(ValueError, match="Name of the training cannot be used"):
        choose_folder(tmp_path, name, resume=True, steps=10)


def test_folders_are_numbered_and_the_unfinished_one_is_found_again(tmp_path):
    check_name("Größe 1.5 [v2]")
    first = choose_folder(tmp_path, "x[1]", resume=True, steps=10)
    assert first.name == "x[1]_001"
    first.mkdir()
    assert choose_folder(tmp_path, "x[1]", resume=True, steps=10) == first
    (first / "result.json").write_text('{"step": 10, "file": "x"}')
    assert choose_folder(tmp_path, "x[1]", resume=True, steps=20) == first
    assert choose_folder(tmp_path, "x[1]", resume=True, steps=10).name == "x[1]_002"
    assert choose_folder(tmp_path, "x[1]", resume=False, steps=20).name == "x[1]_002"


def test_the_course_of_the_learning_rate():
    def course(**fields):
        settings = TrainingSettings(steps=10, **fields)
        return [round(rate_factor(settings, step), 4) for step in range(10)]

    assert course() == [1.0] * 10
    assert course(warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert course(schedule="linear") == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    cosine = course(schedule="cosine", warmup_steps=2, floor=0.1)
    assert cosine[:3] == [0.5, 1.0, 1.0] and cosine == sorted(cosine[:2]) + sorted(cosine[2:], reverse=True)
    assert 0.1 < cosine[-1] < 0.2


@pytest.mark.parametrize(
    "line, match",
    [
        ("name: 2024", "got name: 2024 in 'c.yaml', expected texts"),
        ("model: 5", "got model: 5"),
        ("name:", "got name: None"),
        ("output: [a]", r"got output: \['a'\]"),
        ("resume: maybe", "got resume: 'maybe'.* yes or no for resume"),
        ("resume: 1", "got resume: 1"),
        ("variant: sigma", "got variant: 'sigma'"),
        ("weights: both", "got weights: 'both'"),
        ("prompts: [1, a]", r"got prompts: \[1, 'a'\]"),
        ("vae: 3.5", "got vae: 3.5"),
        ("settings: lora", "got other settings"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(line, match, tmp_path):
    file = tmp_path / "c.yaml"
    values = {"model": "model: m", "features": "features: f", **{line.split(":")[0]: line}}
    file.write_text("\n".join(values.values()), encoding="utf-8")
    with pytest.raises(ValueError, match=f"Configuration does not fit: {match}"):
        read_config(file)


def test_the_users_own_folder_is_written_as_in_a_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "me"))
    file = tmp_path / "c.yaml"
    file.write_text("model: ~/m.pth\nfeatures: f\noutput: ~/runs\nprompts: ~/p.txt\nvae: a/~", encoding="utf-8")
    config = read_config(file)
    own = tmp_path / "me"
    assert [config.model, config.output, config.prompts] == [str(own / name) for name in ("m.pth", "runs", "p.txt")]
    assert config.features == str(tmp_path / "f") and config.vae == str(tmp_path / "a" / "~")


def test_several_datasets_with_their_shares_in_a_configuration(tmp_path):
    file = tmp_path / "training.yaml"
    file.write_text("model: m.pth\nfeatures: {photos: 3, /abs/drawings: 0.5}\n")
    config = read_config(file)
    assert config.features == {str(tmp_path / "photos"): 3, "/abs/drawings": 0.5}
    write_config(tmp_path / "again.yaml", config)
    assert read_config(tmp_path / "again.yaml").features == config.features
    for wrong in ("{}", "{a: many}", "{a: true}", "[a, b]"):
        file.write_text(f"model: m.pth\nfeatures: {wrong}\n")
        with pytest.raises(ValueError, match="Configuration does not fit: got features"):
            read_config(file)
