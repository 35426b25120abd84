"""The workflows that the pack ships: up to date, tidy, equal in both formats, and running in a real queue."""

import json
from io import BytesIO
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

from pixart_pack.editor.format.api import to_api, widget_values
from pixart_pack.editor.format.graph import PACK
from pixart_pack.editor.templates.__main__ import make, make_blueprints
from pixart_pack.editor.templates.collection import TITLES, WORKFLOWS
from pixart_pack.editor.templates.files import ENTRIES
from pixart_pack.editor.templates.rehearsal import NEEDS, prepare, rehearse

FOLDER = Path(__file__).parent.parent.parent / "workflows"
BLUEPRINTS = sorted((FOLDER.parent / "subgraphs").glob("*.json"))
# The last published version of the graphs whose nodes or settings have changed since.
PUBLISHED = Path(__file__).parent.parent / "published"
NAMES = list(WORKFLOWS)
TITLE_PX = 30
LARGEST_THUMBNAIL = 100_000


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_workflow(name: str) -> dict:
    return read(FOLDER / f"{TITLES[name]}.json")


def all_nodes(workflow: dict) -> list[dict]:
    """The nodes of a workflow and of its subgraphs."""
    inside = (workflow.get("definitions") or {}).get("subgraphs", [])
    return [node for graph in (workflow, *inside) for node in graph["nodes"]]


@pytest.fixture(scope="module")
def object_info(start_host):
    return start_host().object_info()


@pytest.fixture(scope="module")
def ready_host(start_host):
    host = start_host()
    prepare(host)
    return host


def run(host, api: dict) -> tuple[list, list]:
    """Run a workflow in API format small; returns the pictures that it saves, and its texts."""
    entry = host.wait(host.queue(rehearse(api, steps=2, side_px=64)))
    saving = {number for number, node in api.items() if node["class_type"] == "SaveImage"}
    entry["outputs"] = {
        number: output for number, output in entry["outputs"].items() if number in saving or "text" in output
    }
    texts = [text for output in entry["outputs"].values() for text in output.get("text", ())]
    return [Image.open(BytesIO(content)) for content in host.images(entry)], texts


@pytest.mark.parametrize("name", NAMES)
def test_who_opens_one_without_the_pack_is_offered_it(name):
    for node in all_nodes(read_workflow(name)):
        known = {key: node["properties"][key] for key in ("cnr_id", "ver") if key in node["properties"]}
        assert known == (PACK if node["type"].startswith("PixArt") else {})
    assert PACK["cnr_id"] == "pixart-pack"


def boxes(workflow: dict) -> dict:
    """By node: left, top, right, bottom in pixels, the title counted."""
    return {
        (node["id"], node["type"]): (
            node["pos"][0],
            node["pos"][1] - TITLE_PX,
            node["pos"][0] + node["size"][0],
            node["pos"][1] + node["size"][1],
        )
        for node in workflow["nodes"]
    }


def overlap(one: tuple, other: tuple) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def test_every_workflow_of_the_collection_is_there():
    titles = list(TITLES.values())
    assert sorted(NAMES) == sorted(TITLES) == sorted(path.stem for path in (FOLDER / "api").glob("*.json"))
    assert titles == sorted(titles) == sorted(path.stem for path in FOLDER.glob("*.json"))
    assert titles == sorted(path.stem for path in FOLDER.glob("*.jpg"))


@pytest.mark.parametrize("name", NAMES)
def test_is_what_the_tool_writes(name, object_info):
    # Mend with: python dev.py run -m pixart_pack.editor.templates
    if not object_info["SaveImage"]["output"]:
        pytest.skip("ComfyUI's own nodes had other outputs in this version")
    assert read_workflow(name) == make(name, object_info)


def test_the_blueprints_are_what_the_tool_writes(object_info):
    # Mend with: python dev.py run -m pixart_pack.editor.templates
    if not object_info["SaveImage"]["output"]:
        pytest.skip("ComfyUI's own nodes had other outputs in this version")
    assert {path.stem: read(path) for path in BLUEPRINTS} == make_blueprints(object_info)


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_are_equal(name, object_info):
    shipped, converted = read(FOLDER / "api" / f"{name}.json"), to_api(read_workflow(name), object_info)
    for node in (*shipped.values(), *converted.values()):
        del node["_meta"]  # the titles of ComfyUI's own nodes, which change with its version
    assert shipped == converted


@pytest.mark.parametrize("name", NAMES)
def test_is_tidy(name):
    workflow = read_workflow(name)
    places = boxes(workflow)
    assert not [pair for pair in combinations(places, 2) if overlap(places[pair[0]], places[pair[1]])]
    groups = [group["bounding"] for group in workflow["groups"]]
    groups = [(left, top, left + width, top + height) for left, top, width, height in groups]
    assert not [pair for pair in combinations(groups, 2) if overlap(*pair)]
    for box in places.values():
        assert sum(g[0] <= box[0] and g[1] <= box[1] and box[2] <= g[2] and box[3] <= g[3] for g in groups) == 1
    lefts = {node["id"]: node["pos"][0] for node in workflow["nodes"]}
    assert all(lefts[origin] <= lefts[target] for _, origin, _, target, *_ in workflow["links"])


@pytest.mark.parametrize("name", NAMES)
def test_names_the_files_it_needs(name, object_info):
    workflow = read_workflow(name)
    notes = " ".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    for node in all_nodes(workflow):
        if node["type"] not in object_info:
            continue
        for value in widget_values(node, object_info[node["type"]]).values():
            if value in ENTRIES:
                [entry] = (each for each in node["properties"]["models"] if each["name"] == value)
                assert entry in ENTRIES[value] and entry["url"].endswith(f"/{value}")
                assert value in notes and entry["url"].split("/resolve/")[0] in notes


@pytest.mark.parametrize("name", NAMES)
def test_has_a_small_thumbnail(name):
    assert 1000 < (FOLDER / f"{TITLES[name]}.jpg").stat().st_size < LARGEST_THUMBNAIL


RUN = [name for name in NAMES if not name.endswith("_app")]  # an app is another workflow's graph, with a page


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(RUN)))
def test_an_app_shows_inputs_and_outputs_that_are_there(name, object_info):
    workflow = read_workflow(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    data = workflow["extra"]["linearData"]
    assert workflow["extra"]["linearMode"] is True and data["outputs"]
    for number, widget in data["inputs"]:
        assert widget in widget_values(nodes[number], object_info[nodes[number]["type"]])
        assert next(each for each in nodes[number]["inputs"] if each["name"] == widget)["label"]
    for number in data["outputs"]:
        assert object_info[nodes[number]["type"]]["output_node"]


@pytest.mark.parametrize("name", RUN)
def test_runs_with_the_demo_model(name, ready_host):
    if name in NEEDS:
        run(ready_host, read(FOLDER / "api" / f"{NEEDS[name]}.json"))
    pictures, texts = run(ready_host, read(FOLDER / "api" / f"{name}.json"))
    assert pictures or texts
    assert all(picture.convert("L").entropy() > 0.5 for picture in pictures)


def used(blueprint: dict, object_info: dict) -> dict:
    """A blueprint in API format, with a picture to start from where it asks for one, and its pictures saved."""
    api = to_api(blueprint, object_info)
    for name, node in tuple(api.items()):
        needs_picture = node["class_type"] in ("PixArtFitImage", "PixArtHEDPreprocessor")
        if needs_picture and "image" not in node["inputs"]:
            api["picture"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
            node["inputs"]["image"] = ["picture", 0]
        if node["class_type"] == "VAEDecode":
            api["saved"] = {"class_type": "SaveImage", "inputs": {"images": [name, 0], "filename_prefix": "blueprint"}}
    return api


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_runs_with_the_demo_model(path, object_info, ready_host):
    pictures, texts = run(ready_host, used(read(path), object_info))
    assert pictures or texts


@pytest.mark.parametrize("name", sorted(path.stem for path in PUBLISHED.glob("*.json")))
def test_a_shared_workflow_of_an_earlier_version_still_works(name, object_info, ready_host):
    published = read(PUBLISHED / "api" / f"{name}.json")
    today = to_api(read(PUBLISHED / f"{name}.json"), object_info)
    assert today.keys() == published.keys()
    for number, node in published.items():
        assert today[number]["class_type"] == node["class_type"]
        assert today[number]["inputs"] == node["inputs"]
    assert published != read(FOLDER / "api" / f"{name}.json"), "it is what today's is: its copy is not needed"
    assert any(run(ready_host, published))
