"""Every node of the host that takes what PixArt's graphs are made of does what `core_nodes.json` says of it."""

import re

import pytest

from pixart_pack.devtools.process import ROOT
from pixart_pack.pixart.weights.reading import read_checkpoint
from pixart_pack.tests.host.core_nodes import (
    CONFIG_FILE,
    FITTING,
    LORA,
    MEANINGS,
    OTHER,
    REFUSED,
    read_table,
    source_picture,
    try_node,
    wanted,
)
from pixart_pack.tests.host.graph import write_lora, write_pixart

WORDS = re.compile(r": got .+, expected .+\. .+")  # how the pack's own messages are built


@pytest.fixture
def server(host):
    config = read_checkpoint(ROOT / CONFIG_FILE).config
    write_lora(host.models / "loras" / LORA, config, "transformer.", strength=0.2)
    write_pixart(host.models / "diffusion_models" / OTHER, config)
    return host


@pytest.mark.slow
def test_core_nodes_mean_what_the_table_says(server):
    picture, plain, table, wrong = server.upload(source_picture(), "core_source.png"), {}, read_table(), {}
    for name, info in sorted(server.object_info().items()):
        if not wanted(info):
            continue
        if name not in table:
            wrong[name] = "not in the table"
            continue
        entry = table[name]
        if "tested" in entry:
            continue
        found, text = try_node(server, info, picture, entry.get("given", {}), plain)
        if found not in FITTING[entry["means"]] or (entry["means"] == REFUSED and not WORDS.search(text)):
            wrong[name] = entry["means"], found, text
    assert len(plain) > 5 and wrong == {}


def test_the_table_is_whole():
    for name, entry in read_table().items():
        assert entry["means"] in MEANINGS and entry["title"], name
        assert entry["means"] != REFUSED or entry["note"], name
        assert (ROOT / entry.get("tested", "tests/host/core_nodes.json")).is_file(), name
