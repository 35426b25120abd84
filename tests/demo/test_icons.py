"""The richer demo model in the making: its pictures, captions, scorer, and the one command that trains it."""

import json
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixart_pack.demo.icons import denoiser_stage, train
from pixart_pack.demo.icons.captions import WORDS, caption, describe
from pixart_pack.demo.icons.evaluate import describe_confusion, describe_rows
from pixart_pack.demo.icons.outlines import FILLINGS, NAMES
from pixart_pack.demo.icons.pool import Bucket, Pool, part_scenes
from pixart_pack.demo.icons.run import Stopped, run_stage
from pixart_pack.demo.icons.scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    Background,
    Item,
    Scene,
    draw_scene,
    is_held_out,
    item_box,
    random_scene,
)
from pixart_pack.demo.icons.scorer import ATTRIBUTES, add_scores, find_background, read, score
from pixart_pack.demo.icons.text import TrainedText
from pixart_pack.demo.text import END, PAD, make_text_batch

pytestmark = pytest.mark.slow

SIZES_PX = [(128, 128), (96, 160), (160, 96)]
WHITE = Background("plain", "white", "white")
seeds = st.integers(0, 2**32 - 1)


def words_tokenizer(captions):
    """A stand-in for T5's: one id per word, the end after them."""
    return SimpleNamespace(
        input_ids=[
            [3 + sum(map(ord, word)) % 900 for word in text.replace(",", " ,").split()] + [END] for text in captions
        ]
    )


@pytest.mark.parametrize("height_px, width_px", SIZES_PX)
def test_drawn_pictures_score_at_least_99_percent(height_px, width_px):
    rng = Random(height_px)
    scenes = [random_scene(rng, 1 + k % 4, height_px, width_px) for k in range(16)]
    readings = [read(draw_scene(scene, height_px, width_px)) for scene in scenes]
    shares = add_scores(score(*both) for both in zip(readings, scenes, strict=True))
    assert all(shares[name] >= 0.99 for name in ATTRIBUTES), shares
    assert max(reading.error for reading in readings) < 0.004
    assert max(reading.outline_px for reading in readings) < 0.5
    assert "| 100.0 % |" in describe_rows({"all": list(zip(readings, scenes, strict=True))})
    assert "| nothing" not in describe_confusion(readings, scenes)


@pytest.mark.parametrize("shape", NAMES)
def test_every_icon_is_told_from_all_others(shape):
    for k, colour in enumerate(COLOURS):
        item = Item(shape, colour, list(POSITIONS)[k], "small", FILLINGS[k % 3])
        (found,) = read(draw_scene(Scene(WHITE, (item,)))).found
        names = ("shape", "colour", "position", "size", "filling")
        assert [getattr(found, name) for name in names] == [getattr(item, name) for name in names]


def test_a_blurred_icon_has_a_worse_outline_and_error():
    scene = Scene(WHITE, (Item("star", "red", "center", "large"),))
    sharp = draw_scene(scene)
    bent = np.roll(sharp, 6, axis=1)
    bent[64:] = sharp[64:]
    assert read(bent).outline_px > 2 * read(sharp).outline_px + 0.3
    assert read(bent).error > 3 * read(sharp).error
    assert read(np.full((64, 64, 3), 130, np.uint8)).found == []


def test_backgrounds_are_told_apart():
    for kind in ("plain", "gradient", "horizon"):
        for name in BACKGROUNDS:
            other = name if kind == "plain" else next(each for each in BACKGROUNDS if each != name)
            background = Background(kind, name, other)
            assert find_background(draw_scene(Scene(background, ()))) == background


@given(seeds, st.integers(1, 4), st.sampled_from(SIZES_PX))
def test_icons_lie_inside_apart_and_in_no_held_out_combination(seed, count, size_px):
    scene = random_scene(Random(seed), count, *size_px)
    assert scene == random_scene(Random(seed), count, *size_px)
    assert len(scene.items) == len({item.position for item in scene.items}) == count
    assert not any(map(is_held_out, scene.items))
    boxes = [item_box(item, *size_px) for item in scene.items]
    for k, (left, top, side) in enumerate(boxes):
        assert 0 <= left <= size_px[1] - side and 0 <= top <= size_px[0] - side
        assert all(left + side < x or x + s < left or top + side < y or y + s < top for x, y, s in boxes[:k])


def test_hold_out_is_even():
    items = [Item(s, c, p, "small") for s in NAMES for c in COLOURS for p in POSITIONS]
    held = [item for item in items if is_held_out(item)]
    assert len(held) == len(items) / 8
    for names, field in ((NAMES, "shape"), (COLOURS, "colour"), (POSITIONS, "position")):
        counts = [sum(getattr(item, field) == name for item in held) for name in names]
        assert min(counts) >= 6 and max(counts) - min(counts) <= 6, (field, counts)


@given(seeds, st.integers(1, 4))
def test_captions_are_repeatable_and_name_every_shape(seed, count):
    scene = random_scene(Random(seed), count)
    text = describe(scene, Random(seed))
    assert text == describe(scene, Random(seed)) == text.lower()
    assert "  " not in text and len(text.split()) <= 60
    for item in scene.items:
        assert any(word in text for pair in WORDS[item.shape] for word in pair)
        assert item.colour in caption(scene) and item.shape in caption(scene)


def test_icons_alike_are_counted():
    items = tuple(Item("star", "red", place, "small") for place in ("top left", "top", "top right"))
    texts = {describe(Scene(WHITE, items), Random(k)) for k in range(40)}
    assert all("three" in text and "stars" in text for text in texts)
    assert any("in a row at the top" in text for text in texts)
    above = Scene(WHITE, (Item("cat", "blue", "top", "small"), Item("house", "red", "bottom", "small")))
    assert any(" over " in describe(above, Random(k)) for k in range(60))


def test_a_word_that_was_never_met_means_the_same_as_any_other():
    text = TrainedText([PAD, END, 700])
    with torch.no_grad():
        text.words[-1] = 0.5
    table = text.fill_table().shared.weight
    assert torch.equal(table[5], table[9]) and not torch.equal(table[5], table[700])


def tiny_options(folder):
    return SimpleNamespace(work=folder, scale=1.0, batch=1, seed=0, device="cpu", workers=0, tokenizer=None)


@pytest.fixture
def tiny(monkeypatch):
    """A training of a few steps on a few scenes."""
    monkeypatch.setattr("pixart_pack.demo.icons.pool.PART", 12)
    buckets = (Bucket(64, 64, 1, 1.0, (1, 1, 1, 1)),)
    monkeypatch.setattr(train, "SMALL_BUCKETS", buckets)
    monkeypatch.setattr(train, "FULL_BUCKETS", buckets)
    monkeypatch.setattr(train, "STEPS", {"autoencoder": 2, "denoiser": 2, "decoder": 1})
    monkeypatch.setattr(train, "CROPS", 1)
    monkeypatch.setattr(train, "SCENES", 2)
    monkeypatch.setattr(train, "load_tokenizer", lambda folder: words_tokenizer)
    monkeypatch.setattr(denoiser_stage, "vocabulary", lambda tokenizer: [PAD, END, *range(3, 903)])


def test_one_command_trains_all_and_goes_on_where_it_was_stopped(tiny, tmp_path):
    whole = train.Training(tiny_options(tmp_path / "whole"), lambda: False)
    halting = train.Training(tiny_options(tmp_path / "halting"), lambda: True)
    for name in train.STEPS:
        whole.run(name)
        for _ in range(5):
            try:
                halting.stop = lambda name=name: name != "denoiser"
                halting.run(name)
                break
            except Stopped:
                continue
    for file in ("vae/pixart_demo_vae", "diffusion_models/pixart_demo", "text_encoders/pixart_demo_t5"):
        one, other = (tmp_path / name / "models" / f"{file}.safetensors" for name in ("whole", "halting"))
        assert one.read_bytes() == other.read_bytes(), file
    log = tmp_path / "whole" / "autoencoder" / "checkpoint.pt"
    stamp = log.stat().st_mtime_ns
    for name in train.STEPS:
        whole.run(name)
    assert log.stat().st_mtime_ns == stamp


def test_the_log_holds_measurements(tmp_path):
    stage = SimpleNamespace(
        batches=lambda: [None] * 40,
        step=lambda *_: {"loss": 1.0},
        measure=lambda: {"psnr_db": 30.0},
        state_dict=dict,
        load_state_dict=lambda state: None,
    )
    run_stage(stage, tmp_path, 40, hold=0.5, measure_every=40)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40]
    assert lines[1]["psnr_db"] == 30.0 and "psnr_db" not in lines[0]


def test_pool_is_repeatable_and_of_its_encoder_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("pixart_pack.demo.icons.pool.PART", 6)
    buckets = (Bucket(64, 80, 1, 1.0, (1, 1, 1, 1)),)
    one, other = (train.AutoencoderStage(seed=seed).averaged() for seed in (0, 1))
    first, again = Pool(buckets, tmp_path, one), Pool(buckets, tmp_path, one)
    assert torch.equal(first.latents[0], again.latents[0]) and first.latents[0].shape == (6, 4, 8, 10)
    assert not torch.equal(Pool(buckets, tmp_path, other).latents[0], first.latents[0])
    assert part_scenes(buckets[0], 0, 0) == first.scenes[0]
    assert first.draw(Random(0), 3)[1] == again.draw(Random(0), 3)[1]
    assert make_text_batch([caption(first.scenes[0][0])], words_tokenizer).ids.shape[0] == 1
