"""The demo's client program: what it does to a workflow."""

import argparse
import json
import re

import pytest

from pixart_pack.demo import pictures
from pixart_pack.demo.scenes import Item, is_held_out

WORKFLOW = {
    "1": {"class_type": "Encode", "inputs": {"text": "", "clip": ["9", 0]}},
    "2": {"class_type": "Negative", "inputs": {"text": "ugly", "positive": ["1", 0]}},
    "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "4": {
        "class_type": "KSampler",
        "inputs": {"seed": 1, "steps": 20, "cfg": 4.5, "positive": ["5", 0], "latent_image": ["3", 0]},
    },
    "5": {"class_type": "Size", "inputs": {"conditioning": ["1", 0], "width": ["3", 0]}},
    "9": {"class_type": "LoadCLIP", "inputs": {"name": "t5"}},
}


def fill(**settings) -> dict:
    names = ("seed", "steps", "guidance", "size")
    options = argparse.Namespace(**{name: settings.get(name) for name in names})
    return pictures.fill_workflow(json.dumps(WORKFLOW), "a caption", options)


def test_settings_not_given_are_left_to_the_workflow():
    expected = json.loads(json.dumps(WORKFLOW))
    expected["1"]["inputs"]["text"] = "a caption"
    assert fill() == expected


def test_settings_are_filled_in():
    workflow = fill(seed=7, steps=3, guidance=2.5, size=(96, 160))
    assert {name: workflow["4"]["inputs"][name] for name in ("seed", "steps", "cfg")} == {
        "seed": 7,
        "steps": 3,
        "cfg": 2.5,
    }
    assert workflow["3"]["inputs"] == {"width": 96, "height": 160, "batch_size": 1}
    assert workflow["5"]["inputs"]["width"] == ["3", 0]
    assert workflow["2"]["inputs"]["text"] == "ugly"


def test_the_sheet_says_model_steps_guidance_and_seed():
    workflow = fill(seed=7) | {"2": {"class_type": "Load", "inputs": {"checkpoint": "small.safetensors"}}}
    workflow["8"] = {"class_type": "Other", "inputs": {"seed": ["4", 0], "steps": ["4", 1]}}
    assert pictures.describe_run(workflow) == "small, steps 20, guidance 4.5, seed 7"
    shipped = json.loads(pictures.WORKFLOW.read_text(encoding="utf-8"))
    assert re.fullmatch(r"pixart_demo, steps \d+, guidance [\d.]+, seed \d+", pictures.describe_run(shipped))


def test_a_workflow_without_the_setting_is_refused():
    with pytest.raises(ValueError, match="No denoise in the workflow: cannot set it to 1"):
        pictures.set_inputs(WORKFLOW, ("denoise",), 1)
    with pytest.raises(ValueError, match="No prompt in the workflow"):
        pictures.find_prompt_node({"3": WORKFLOW["3"]})


def test_captions_are_of_combinations_held_out_of_training():
    thing = re.compile(
        r"a (small|large) (\w+) (\w+) (?:in|on|at) the ((?:top|bottom|left|right|center)(?: left| right)?)"
    )
    for caption in pictures.CAPTIONS:
        items = [Item(shape, colour, position, size) for size, colour, shape, position in thing.findall(caption)]
        assert len(items) == 1 + caption.count(" and ")
        assert all(map(is_held_out, items)), caption
