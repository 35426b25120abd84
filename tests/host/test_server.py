"""The pack in a real server: it loads, and its nodes are there."""

import re

import pytest

from pixart_pack.demo.client import PromptError


def ours(host) -> dict:
    return {name: info for name, info in host.object_info().items() if info["python_module"].endswith(".pixart_pack")}


def test_loads_without_complaint(host):
    started = host.log().split("got prompt")[0]  # what other tests' wrong files cause comes later
    lines = [line for line in started.splitlines() if "pixart" in line.lower()]
    assert lines, started
    assert not [line for line in lines if re.search(r"error|failed|warning|cannot", line, re.IGNORECASE)]
    assert not [line for line in lines if line.lstrip().startswith("File ")]  # part of a traceback


def test_serves_every_node(host, pack):
    current = {name for name, info in ours(host).items() if not info["deprecated"]}
    assert current == {node.GET_SCHEMA().node_id for node in pack}


def test_nodes_explain_themselves(host):
    for node_id, info in ours(host).items():
        assert info["description"], node_id
        if info["deprecated"]:  # asks as the old node did
            continue
        for name, field in {**info["input"].get("required", {}), **info["input"].get("optional", {})}.items():
            assert field[1].get("tooltip"), f"{node_id}.{name}"


def test_refuses_a_wrong_workflow_with_its_reasons(host):
    workflow = {"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
    with pytest.raises(PromptError, match=r"SaveImage: Required input is missing \(images\)"):
        host.queue(workflow)


def test_runs_a_workflow_and_returns_its_pictures(host):
    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 24, "height": 16, "batch_size": 2, "color": 0xFF8000}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "test"}},
    }
    pictures = host.run(workflow, timeout_s=60)
    assert [picture.size for picture in pictures] == [(24, 16)] * 2
    assert pictures[0].getpixel((3, 3)) == (255, 128, 0)


def test_names_the_node_that_fails(host):
    inputs = {"string": "a", "regex_pattern": "(", "replace": "", "case_insensitive": False, "multiline": False}
    workflow = {
        "1": {"class_type": "RegexReplace", "inputs": {**inputs, "dotall": False, "count": 0}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    with pytest.raises(PromptError, match="RegexReplace failed: .*unterminated subpattern"):
        host.run(workflow, timeout_s=60)
