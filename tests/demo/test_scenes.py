"""The demo's pictures and captions, and the scorer that reads the pictures back."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixart_pack.demo.evaluate import describe_sharpness, held_out_scenes, make_confusion_table, make_table
from pixart_pack.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    OUTLINES,
    POSITIONS,
    TRAINED_SHAPES,
    Item,
    Scene,
    caption,
    describe,
    draw_scene,
    is_held_out,
    item_box,
    random_scene,
)
from pixart_pack.demo.scorer import ATTRIBUTES, add_scores, count_confusions, find_background, find_items, score
from pixart_pack.demo.sharpness import measure_sharpness

SIZES_PX = [(128, 128), (96, 160), (160, 96), (104, 152), (64, 64)]
seeds = st.integers(0, 2**32 - 1)


def triples(scene):
    return {(item.shape, item.colour, item.position) for item in scene.items}


@pytest.mark.slow
@pytest.mark.parametrize("height_px, width_px", SIZES_PX)
def test_fresh_pictures_score_at_least_99_percent(height_px, width_px):
    rng = Random(height_px)
    scenes = [random_scene(rng, 1 + k % 3, height_px, width_px) for k in range(24)]
    shares = add_scores(score(draw_scene(scene, height_px, width_px), scene) for scene in scenes)
    assert all(shares[name] >= 0.99 for name in (*ATTRIBUTES, "count")), shares


@pytest.mark.parametrize("shape", sorted(OUTLINES))
def test_every_shape_is_told_from_all_others(shape):
    for colour in COLOURS:
        scene = Scene("gray", (Item(shape, colour, "center", "small"),))
        (found,) = find_items(draw_scene(scene), "gray", tuple(OUTLINES))
        assert (found.shape, found.colour, found.position) == (shape, colour, "center")


def test_wrong_pictures_score_nothing():
    scene = Scene("white", (Item("circle", "red", "left", "small"), Item("cross", "blue", "right", "large")))
    other = Scene("black", (Item("square", "green", "top", "small"), Item("triangle", "cyan", "bottom", "large")))
    assert [right for right, _ in score(draw_scene(other), scene).values()] == [0, 0, 0, 0, 1]
    empty = draw_scene(Scene("white", ()))
    assert score(empty, scene) == {
        "background": (1, 1),
        "colour": (0, 2),
        "position": (0, 2),
        "shape": (0, 2),
        "count": (0, 1),
    }


@pytest.mark.slow
def test_drawn_pictures_are_as_sharp_as_can_be():
    scenes = held_out_scenes(6, 128, 128) + held_out_scenes(6, 96, 160)
    pictures = [draw_scene(scene) for scene in scenes[:6]] + [draw_scene(scene, 96, 160) for scene in scenes[6:]]
    for picture in pictures:
        error, outline_px = measure_sharpness(picture)
        assert error < 0.002 and outline_px < 0.3
    assert "outlines 0." in describe_sharpness(pictures)
    table = make_confusion_table(pictures, scenes)
    assert len(table.splitlines()) == 2 + len(TRAINED_SHAPES) and table.endswith("| 0 |")


def test_a_bent_shape_is_less_sharp():
    picture = draw_scene(Scene("gray", (Item("circle", "red", "center", "large"),)))
    bent = np.roll(picture, 6, axis=1)
    bent[64:] = picture[64:]
    straight, crooked = measure_sharpness(picture), measure_sharpness(bent)
    assert crooked[0] > 3 * straight[0] and crooked[1] > straight[1] + 0.5
    assert measure_sharpness(np.full((64, 64, 3), 128, np.uint8)) == (0.0, None)


def test_confusions_are_counted_by_shape():
    drawn = Scene("gray", (Item("circle", "red", "center", "small"), Item("cross", "blue", "top left", "small")))
    told = Scene("gray", (Item("square", "red", "center", "small"), Item("cross", "blue", "top left", "small")))
    lone = Scene("gray", (Item("circle", "red", "center", "small"),))
    seen = count_confusions([draw_scene(drawn), draw_scene(lone)], [told, told])
    assert seen["square"] == {"circle": 2} and seen["cross"] == {"cross": 1, "nothing": 1}
    assert not seen["circle"] and not seen["triangle"]


def test_scorer_bears_noise_and_flat_nonsense():
    scene = random_scene(Random(3), 2)
    noisy = draw_scene(scene).astype(float) + np.random.default_rng(0).normal(0, 12, (128, 128, 3))
    shares = add_scores([score(noisy.clip(0, 255).astype(np.uint8), scene)])
    assert shares == dict.fromkeys(shares, 1.0)
    assert find_items(np.full((64, 64, 3), 128, np.uint8), "gray") == []
    assert find_background(np.full((8, 8, 3), 250, np.uint8)) == "white"


@pytest.mark.slow
@given(seeds, st.integers(1, 3), st.sampled_from(SIZES_PX))
def test_training_never_draws_a_held_out_combination(seed, count, size_px):
    scene = random_scene(Random(seed), count, *size_px)
    assert len(scene.items) == len(triples(scene)) == count
    assert not any(map(is_held_out, scene.items))


@given(seeds, st.integers(1, 2), st.sampled_from(SIZES_PX))
def test_held_out_scenes_hold_nothing_else(seed, count, size_px):
    assert all(map(is_held_out, random_scene(Random(seed), count, *size_px, held_out=True).items))


def test_hold_out_is_even():
    items = [Item(s, c, p, "small") for s in TRAINED_SHAPES for c in COLOURS for p in POSITIONS]
    held = [item for item in items if is_held_out(item)]
    assert len(held) == len(items) / 8
    for names, field in ((TRAINED_SHAPES, "shape"), (COLOURS, "colour"), (POSITIONS, "position")):
        counts = [sum(getattr(item, field) == name for item in held) for name in names]
        assert min(counts) >= 3 and max(counts) - min(counts) <= 1


@given(seeds, st.integers(1, 3), st.sampled_from(SIZES_PX))
def test_items_lie_inside_and_apart(seed, count, size_px):
    height_px, width_px = size_px
    boxes = [item_box(item, *size_px) for item in random_scene(Random(seed), count, *size_px).items]
    for k, (left, top, side) in enumerate(boxes):
        assert 0 <= left <= width_px - side and 0 <= top <= height_px - side
        for x, y, s in boxes[:k]:
            assert left + side < x or x + s < left or top + side < y or y + s < top


@given(seeds, st.integers(1, 3))
def test_scenes_and_captions_are_repeatable(seed, count):
    scene = random_scene(Random(seed), count)
    assert scene == random_scene(Random(seed), count)
    assert describe(scene, Random(seed)) == describe(scene, Random(seed))
    for text in (describe(scene, Random(seed)), caption(scene)):
        assert text == text.lower()
        assert len(text.split()) <= 40
        assert scene.background in text
        assert all(item.colour in text and item.shape in text for item in scene.items)


def test_pictures_are_repeatable_and_antialiased():
    scene = random_scene(Random(1), 3)
    picture = draw_scene(scene, 96, 160)
    assert picture.shape == (96, 160, 3) and picture.dtype == np.uint8
    assert (picture == draw_scene(scene, 96, 160)).all()
    plain = {BACKGROUNDS[scene.background], *(COLOURS[item.colour] for item in scene.items)}
    assert {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()} > plain


def test_evaluation_scenes_and_table():
    scenes = held_out_scenes(10, 128, 128)
    assert [len(scene.items) for scene in scenes] == [1, 2] * 5
    assert scenes == held_out_scenes(10, 128, 128)
    table = make_table({"all": {"background": 0.5, "colour": 1.0, "position": 0.25, "shape": 0.0, "count": 0.1}})
    assert "| all | 50.0 % | 100.0 % | 25.0 % | 0.0 % | 10.0 % |" in table
