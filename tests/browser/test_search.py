"""What the editor's search for nodes finds of ours, in a plain install, before and after its lists are refreshed."""

import pytest

pytestmark = pytest.mark.slow

FIRST = {"Load PixArt Checkpoint", "PixArt Text Encode"}
FOUND = {
    "controlnet": "Load PixArt ControlNet",
    "scheduler": "PixArt Scheduler",
    "sigma": "PixArt Sampling Preset",
    "t5": "Load T5 Text Encoder",
    "pixart sigma": "Load PixArt Diffusers",
}


def test_our_nodes_are_found_by_their_words(editor):
    assert set(editor.search_nodes("pixart")[:2]) == FIRST
    for word, title in FOUND.items():
        assert title in editor.search_nodes(word)[:3], word


def test_our_nodes_are_found_after_the_lists_were_refreshed(editor):
    editor.page.evaluate("app.refreshComboInNodes()")
    assert set(editor.search_nodes("pixart")[:2]) == FIRST
