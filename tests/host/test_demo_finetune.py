"""Teaching the demo model: the commands run through, and their data is what they say it is."""

from pathlib import Path

import pytest
from safetensors import safe_open

from pixart_pack.demo import finetune
from pixart_pack.demo.finetune import (
    SHAPE,
    WORD,
    Sampling,
    draw,
    lesson_scenes,
    make_features,
    make_table,
    measure,
    named,
    new_scenes,
    shape_of,
)
from pixart_pack.demo.scenes import POSITIONS, TRAINED_SHAPES, caption, draw_scene


@pytest.fixture(scope="module")
def tokenizer_folder(comfyui) -> Path:
    return comfyui / "comfy" / "text_encoders" / "t5_tokenizer"


def test_lessons_show_the_new_shape_once_and_tests_show_it_elsewhere():
    lessons = lesson_scenes(20)
    tests = new_scenes("tests", 50, lessons)
    for scene in lessons + tests:
        assert [item.shape for item in scene.items if item.shape not in TRAINED_SHAPES] == [SHAPE]
    assert {shape_of(scene).position for scene in lessons[:9]} == set(POSITIONS)
    assert {len(scene.items) for scene in lessons} == {1, 2} and {len(scene.items) for scene in tests} == {1}
    taught = {(shape_of(scene).colour, shape_of(scene).position) for scene in lessons}
    assert not taught & {(shape_of(scene).colour, shape_of(scene).position) for scene in tests}


def test_the_new_shape_is_never_named_by_its_name():
    scene = new_scenes("lessons", 1)[0]
    assert SHAPE in caption(scene)
    assert SHAPE not in named(scene, WORD) and WORD in named(scene, WORD)


def test_the_scorer_tells_the_new_shape_from_those_that_are_known():
    scenes = new_scenes("tests", 10)
    assert measure([draw_scene(scene) for scene in scenes], scenes)["shape"] == 1.0
    assert make_table({"x": {"a": 0.5}}, ["a", "b"]).splitlines()[-1] == "| x | 50.0 % |  |"


def test_priors_are_marked(tokenizer_folder):
    model = finetune.load_model(tokenizer_folder)
    scenes = new_scenes("lessons", 3)
    features = make_features(model, [draw_scene(scene) for scene in scenes], [caption(s) for s in scenes], 2)
    assert [features[i].is_prior for i in range(3)] == [False, False, True]
    assert features.bins == [(16, 16)] * 3
    few = draw(model, scenes[:1], Sampling(1, 1.0, "lcm", "lcm"))
    assert few[0].shape == (128, 128, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dreambooth", "lcm"])
def test_every_lesson_runs_through(tmp_path, monkeypatch, caplog, tokenizer_folder, kind):
    monkeypatch.setattr(finetune, "REMINDERS", 2)
    monkeypatch.setattr(finetune, "PRIOR_PICTURES", 2)
    path, caplog_level = tmp_path / "lora.safetensors", caplog.at_level("INFO")
    with caplog_level:
        finetune.main(
            [kind, "--steps", "2", "--count", "2", "--scenes", "8", "--threads", "1", "--save", str(path)]
            + ["--tokenizer", str(tokenizer_folder), "--sheet", str(tmp_path / "sheet.png")]
        )
    assert caplog.messages[-1].count("\n") >= 3
    if kind != "dreambooth":
        with safe_open(path, "pt") as file:
            assert any("lora" in name for name in file.keys())  # noqa: SIM118
