"""A training node while it runs, as its user sees it: words, curve, pictures, and a button that stops it or goes on."""

import json
import re
import time
from pathlib import Path

import pytest

from pixart_pack.editor.templates.rehearsal import rehearse
from pixart_pack.tests.browser.editor import NODES_2, in_both, shipped_workflow

pytestmark = pytest.mark.slow

WORKFLOWS = Path(__file__).parents[2] / "workflows"
TRAINER = "PixArtTrainLoRA"
NODE = f"app.graph.nodes.find(node => node.type === '{TRAINER}')"
STEPS = 400  # more than are made here: it is stopped
SAID = f"() => {NODE}.widgets.find(widget => widget.name === '$$node-text-preview')?.value ?? ''"
RUNNING = re.compile(rf"step \d+ of {STEPS}, [\d hmins]+ left\s*\nloss \d\.\d{{4}}, [\d.]+ pictures/s, [\d.]+/\d+ GB")
BUTTONS = f"() => {NODE}.widgets.filter(widget => widget.type === 'button').map(widget => widget.label)"
SHOW = f"""() => {{
    const node = {NODE};
    app.canvas.ds.scale = 0.75;
    app.canvas.ds.offset = [500 - node.pos[0], 120 - node.pos[1]];
    app.canvas.setDirty(true, true);
}}"""
PRESS = f"() => {NODE}.widgets.find(widget => widget.type === 'button').callback()"
LAYOUT = f"""() => {{
    const element = document.querySelector(`[data-node-id="${{{NODE}.id}}"]`);
    const box = part => element.querySelector(part).getBoundingClientRect();
    return [box('.comfy-markdown-content').top, box('.lg-node-widgets').bottom, box('img[class*=object-contain]').top,
            element.querySelector('.comfy-markdown-content').innerText, app.canvas.ds.scale];
}}"""


def press(editor, renderer, label):
    if renderer == NODES_2:
        # In Nodes 2.0 the page of the node's details, where it is open, shows the button too.
        editor.page.locator("[data-node-id]").get_by_role("button", name=label).click()
    else:
        editor.page.evaluate(PRESS)


def long_training(name):
    prompt = rehearse(json.loads((WORKFLOWS / "api" / "lora_training.json").read_text(encoding="utf-8")), steps=2)
    for node in prompt.values():
        if node["class_type"] == TRAINER:
            node["inputs"] |= {"name": name, "steps": STEPS, "sample_every": 10, "sample_steps": 2}
    return prompt


@in_both
def test_a_training_shows_its_course_is_stopped_and_goes_on(editor, renderer):
    editor.load(shipped_workflow("lora_training"))
    editor.fill(long_training(f"watched_{time.time_ns()}"))
    editor.page.evaluate(SHOW)
    editor.begin()
    editor.page.wait_for_function(f"({SAID})().includes('step 1') && window.previews.length > 1")
    assert RUNNING.fullmatch(editor.page.evaluate(SAID).strip())
    assert editor.page.evaluate(BUTTONS) == ["Stop and save"]
    if renderer == NODES_2:
        text_top, widgets_bottom, picture_top, text, scale = editor.page.evaluate(LAYOUT)
        assert text.count("\n") == 1  # two lines, as they are sent
        assert picture_top - text_top < 120 * scale and picture_top - widgets_bottom < 20 * scale  # no gap between
    editor.shoot(f"training_{renderer}")
    press(editor, renderer, "Stop and save")
    assert editor.end()[0] == "execution_success"
    editor.page.wait_for_function(f"({SAID})().startsWith('stopped:')")
    made = int(editor.page.evaluate(SAID).split()[1])
    assert "queue it again to go on" in editor.page.evaluate(SAID)
    editor.shoot(f"training_stopped_{renderer}")
    assert editor.page.evaluate(BUTTONS) == ["Go on"]
    editor.page.evaluate(
        f"steps => {{ {NODE}.widgets.find(widget => widget.name === 'steps').value = steps }}", made + 2
    )
    press(editor, renderer, "Go on")
    editor.page.wait_for_function("window.ends.length > 1")
    lines = editor.page.evaluate(SAID).split("\n")
    assert lines[0].strip() == f"done: {made + 2} of {made + 2} steps"
    assert re.fullmatch(r"saved in output: loras/watched_\d+_001\.safetensors", lines[1].strip())
    assert editor.page.evaluate(BUTTONS) == []
    editor.wait_for_rest()
    editor.check_places()
    editor.shoot(f"training_done_{renderer}")
