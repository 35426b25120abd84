"""From the editor's format to the API's: what the editor does with links, modes, and nodes of its own."""

import pytest

from pixart_pack.editor.format.api import to_api

INFO = {
    "Load": {
        "input": {"required": {"name": [["a", "b"], {}]}},
        "output": ["MODEL"],
        "output_name": ["model"],
        "display_name": "Load it",
    },
    "Change": {
        "input": {"required": {"model": ["MODEL", {}], "strength": ["FLOAT", {"default": 1.0}]}},
        "output": ["MODEL"],
        "output_name": ["model"],
    },
    "Run": {
        "input": {
            "required": {"model": ["MODEL", {}], "seed": ["INT", {}], "hint": ["STRING", {"forceInput": True}]},
            "optional": {"picture": [["x.png"], {"image_upload": True}], "mode": ["COMBO", {"options": ["p", "q"]}]},
        },
        "output": [],
        "output_name": [],
    },
}


def node(number: int, kind: str, values=(), inputs=(), outputs=(), mode=0) -> dict:
    """inputs: (name, type, link). outputs: types."""
    return {
        "id": number,
        "type": kind,
        "mode": mode,
        "inputs": [{"name": name, "type": type_of, "link": link} for name, type_of, link in inputs],
        "outputs": [{"name": type_of, "type": type_of} for type_of in outputs],
        "widgets_values": list(values),
    }


def chain(mode=0, middle="Change", values=(0.5,)) -> dict:
    """Load -> a node in the middle -> Run."""
    return {
        "nodes": [
            node(1, "Load", ["b"], outputs=["MODEL"]),
            node(2, middle, values, [("model", "MODEL", 1)], ["MODEL"], mode),
            node(3, "Run", [7, "fixed", "x.png", "image", "q"], [("model", "MODEL", 2), ("hint", "STRING", None)]),
            node(4, "MarkdownNote", ["read me"]),
        ],
        "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"]],
    }


def test_widgets_and_links():
    api = to_api(chain(), INFO)
    assert api.keys() == {"1", "2", "3"}
    assert api["1"] == {"inputs": {"name": "b"}, "class_type": "Load", "_meta": {"title": "Load it"}}
    assert api["2"]["inputs"] == {"strength": 0.5, "model": ["1", 0]}
    assert api["3"]["inputs"] == {"seed": 7, "picture": "x.png", "mode": "q", "model": ["2", 0]}


def test_a_bypassed_node_lets_its_input_through():
    api = to_api(chain(mode=4), INFO)
    assert api.keys() == {"1", "3"} and api["3"]["inputs"]["model"] == ["1", 0]


def test_a_muted_node_takes_its_links_with_it():
    api = to_api(chain(mode=2), INFO)
    assert api.keys() == {"1", "3"} and "model" not in api["3"]["inputs"]


def test_a_reroute_is_a_wire():
    assert to_api(chain(middle="Reroute", values=()), INFO)["3"]["inputs"]["model"] == ["1", 0]


def test_a_primitive_gives_its_value():
    workflow = chain()
    workflow["nodes"].append(node(5, "PrimitiveNode", [99, "fixed"], outputs=["INT"]))
    workflow["nodes"][2]["inputs"].append({"name": "seed", "type": "INT", "link": 3, "widget": {"name": "seed"}})
    workflow["links"].append([3, 5, 0, 3, 1, "INT"])
    assert to_api(workflow, INFO)["3"]["inputs"]["seed"] == 99


def test_a_list_is_no_link():
    workflow = chain(values=([1, 2],))
    assert to_api(workflow, INFO)["2"]["inputs"]["strength"] == {"__value__": [1, 2]}


def test_a_subgraph_is_opened():
    inner = {
        "id": "sub",
        "inputs": [{"name": "model"}],
        "outputs": [{"name": "MODEL"}],
        "nodes": [node(10, "Change", [0.25], [("model", "MODEL", 1)], ["MODEL"])],
        "links": [
            {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 10, "target_slot": 0, "type": "MODEL"},
            {"id": 2, "origin_id": 10, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "MODEL"},
        ],
    }
    workflow = {**chain(middle="sub", values=()), "definitions": {"subgraphs": [inner]}}
    api = to_api(workflow, INFO)
    assert api["2:10"]["inputs"] == {"strength": 0.25, "model": ["1", 0]}
    assert api["3"]["inputs"]["model"] == ["2:10", 0]


def test_a_subgraph_has_values_of_its_own():
    inner = {
        "id": "sub",
        "inputs": [{"name": "model"}, {"name": "how much"}],
        "outputs": [{"name": "MODEL"}],
        "nodes": [node(10, "Change", [0.25], [("model", "MODEL", 1), ("strength", "FLOAT", 3)], ["MODEL"])],
        "links": [
            {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 10, "target_slot": 0, "type": "MODEL"},
            {"id": 2, "origin_id": 10, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "MODEL"},
            {"id": 3, "origin_id": -10, "origin_slot": 1, "target_id": 10, "target_slot": 1, "type": "FLOAT"},
        ],
    }
    inner["nodes"][0]["inputs"][1]["widget"] = {"name": "strength"}
    workflow = {**chain(middle="sub", values=(0.75,)), "definitions": {"subgraphs": [inner]}}
    assert to_api(workflow, INFO)["2:10"]["inputs"] == {"strength": 0.75, "model": ["1", 0]}
    workflow["nodes"][1]["widgets_values"] = []
    assert to_api(workflow, INFO)["2:10"]["inputs"]["strength"] == 0.25


def test_an_unknown_node_is_named():
    with pytest.raises(ValueError, match="Unknown node type: got Other"):
        to_api(chain(middle="Other"), INFO)
