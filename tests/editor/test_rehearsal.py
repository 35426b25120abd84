"""How the workflows run with the demo model: its words and sizes in place of the big models'."""

import copy
import json
from pathlib import Path

import pytest
from PIL import Image

from pixart_pack.editor.templates.files import DEMO_MODEL, ENTRIES, LCM_1024, stand_in
from pixart_pack.editor.templates.rehearsal import CAPTIONS, LESSONS, halve_bins, rehearse
from pixart_pack.editor.templates.thumbnails import INSET_GAP_PX, INSET_PX, card, change, inset, label, tile

API = Path(__file__).parents[2] / "workflows" / "api"


def read(name: str) -> dict:
    return json.loads((API / f"{name}.json").read_text(encoding="utf-8"))


def of_type(workflow: dict, class_type: str) -> dict:
    return next(node["inputs"] for node in workflow.values() if node["class_type"] == class_type)


@pytest.mark.parametrize("name", sorted(path.stem for path in API.glob("*.json")))
def test_nothing_of_the_big_models_is_left(name):
    for node in rehearse(read(name)).values():
        assert not [value for value in node["inputs"].values() if isinstance(value, str) and value in ENTRIES]
        assert not [value for value in node["inputs"].values() if isinstance(value, str) and value in CAPTIONS]


def test_few_steps_are_few_in_training_too():
    learned, tried = rehearse(read("lora_training")), rehearse(read("lora_training"), steps=2, side_px=64)
    assert of_type(learned, "PixArtTrainLoRA").items() >= LESSONS["PixArtTrainLoRA"].items()
    assert of_type(tried, "PixArtTrainLoRA")["steps"] == of_type(tried, "KSampler")["steps"] == 2
    assert of_type(tried, "PixArtEncodeDataset")["resolution"] == of_type(tried, "EmptyLatentImage")["width"] == 64
    assert of_type(tried, "PixArtLoadCheckpoint")["checkpoint"] == DEMO_MODEL


def test_what_is_enlarged_starts_smaller():
    assert of_type(rehearse(read("hires_fix"), side_px=128), "EmptyLatentImage")["width"] == 96


def test_bins_are_halved_behind_the_node_that_chose_them():
    workflow = halve_bins(rehearse(read("any_aspect_ratio")))
    chosen = next(number for number, node in workflow.items() if node["class_type"] == "PixArtResolution")
    half = of_type(workflow, "LatentUpscaleBy")
    assert half["samples"] == [chosen, 2] and half["scale_by"] == 0.5
    assert workflow[of_type(workflow, "KSampler")["latent_image"][0]]["class_type"] == "LatentUpscaleBy"
    assert halve_bins(read("demo")) == read("demo")


def test_previews_are_inset_side_by_side():
    picture = Image.new("RGB", (400, 400), "black")
    inset(picture, [Image.new("RGB", (128, 128), "red"), Image.new("RGB", (600, 300), "lime")])
    row = [picture.getpixel((x, 400 - INSET_GAP_PX - INSET_PX // 2)) for x in range(400)]
    assert row.count((255, 0, 0)) == INSET_PX and row.count((0, 255, 0)) == 2 * INSET_PX
    assert card("two\nlines").size == (400, 400)
    assert tile([picture] * 3).size == (800, 800)


def test_a_thumbnail_shows_what_goes_in_and_what_comes_out_and_says_what_is_special():
    both = change(Image.new("RGB", (400, 400), "red"), Image.new("RGB", (400, 400), "lime"))
    assert (
        both.size == (400, 400) and both.getpixel((40, 40)) == (255, 0, 0) and both.getpixel((350, 350)) == (0, 255, 0)
    )
    said = label(both, "four steps")
    assert said.size == (400, 400) and len({said.getpixel((x, 380)) for x in range(100, 300)}) > 2


def test_an_official_file_has_the_name_that_it_is_downloaded_with():
    for name, entries in ENTRIES.items():
        assert all(entry["url"].endswith(f"/{name}") and entry["name"] == name for entry in entries)
    copied = copy.deepcopy({"checkpoint": LCM_1024})["checkpoint"]
    assert copied.entry() == LCM_1024.entry() and stand_in(copied) == DEMO_MODEL
