"""From a workflow as the editor saves it to the one that the server's API takes."""

from dataclasses import dataclass, field
from typing import Any

from .schema import VIRTUAL_TYPES, widget_names

MUTED, BYPASSED = 2, 4
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20


@dataclass
class Link:
    """From an output of a node to an input of another."""

    origin_id: int
    origin_slot: int
    target_id: int
    target_slot: int

    @classmethod
    def read(cls, saved: list | dict) -> tuple[int, "Link"]:
        """A saved link, which is a list in a workflow and a dict in its subgraphs. Returns (its number, the link)."""
        if isinstance(saved, dict):
            return saved["id"], cls(*(saved[name] for name in cls.__dataclass_fields__))
        return saved[0], cls(*saved[1:5])


@dataclass
class Scope:
    """One level of nesting: the workflow itself, or a subgraph as one node has it."""

    nodes: dict[int, dict]
    links: dict[int, Link]
    subgraphs: dict[str, dict]
    prefix: str = ""
    parent: "Scope | None" = None
    holder: dict = field(default_factory=dict)  # the node of `parent` that this is the inside of
    definition: dict = field(default_factory=dict)

    @classmethod
    def read(cls, graph: dict, subgraphs: dict[str, dict], **place: Any) -> "Scope":
        nodes = {node["id"]: node for node in graph["nodes"]}
        return cls(nodes, dict(Link.read(link) for link in graph["links"]), subgraphs, **place)

    def enter(self, node: dict) -> "Scope":
        """The inside of a node that is a subgraph."""
        graph = self.subgraphs[node["type"]]
        place = {"prefix": f"{self.prefix}{node['id']}:", "parent": self, "holder": node, "definition": graph}
        return Scope.read(graph, self.subgraphs, **place)


@dataclass(frozen=True)
class Constant:
    """The value of a primitive node, or of a subgraph's own widget."""

    value: Any


def to_api(workflow: dict, object_info: dict) -> dict:
    """The workflow in API format. workflow: in the editor's. object_info: of the server, by node type.

    Raises ValueError for a node that the server does not know.
    """
    subgraphs = {each["id"]: each for each in (workflow.get("definitions") or {}).get("subgraphs") or ()}
    nodes = _nodes_of(Scope.read(workflow, subgraphs), object_info)
    for node in nodes.values():
        node["inputs"] = {name: value for name, value in node["inputs"].items() if not _is_lost(value, nodes)}
    return nodes


def _is_lost(value: Any, nodes: dict) -> bool:
    return isinstance(value, list) and len(value) == 2 and str(value[0]) not in nodes


def _nodes_of(scope: Scope, object_info: dict) -> dict:
    nodes = {}
    for number, node in scope.nodes.items():
        if node.get("mode", 0) in (MUTED, BYPASSED) or node["type"] in VIRTUAL_TYPES:
            continue
        if node["type"] in scope.subgraphs:
            nodes |= _nodes_of(scope.enter(node), object_info)
        else:
            nodes[f"{scope.prefix}{number}"] = _api_node(scope, node, object_info)
    return nodes


def _api_node(scope: Scope, node: dict, object_info: dict) -> dict:
    if node["type"] not in object_info:
        raise ValueError(f"Unknown node type: got {node['type']}, expected one of the server's. Install its pack")
    info = object_info[node["type"]]
    inputs = {name: _wrap(value) for name, value in widget_values(node, info).items()}
    for socket in node.get("inputs", ()):
        source = _source(scope, socket.get("link"))
        if isinstance(source, Constant):
            inputs[socket["name"]] = _wrap(source.value)
        elif source is not None:
            inputs[socket["name"]] = source
    title = node.get("title") or info.get("display_name") or node["type"]
    return {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}


def widget_values(node: dict, info: dict) -> dict:
    """The values of a saved node's widgets by the names of the inputs that they are for."""
    values = node.get("widgets_values") or []
    names = widget_names(info)
    if isinstance(values, dict):
        return {name: values[name] for name in names if name in values}
    return {name: value for name, value in zip(names, values, strict=False) if name is not None}


def _wrap(value: Any) -> Any:
    return {"__value__": value} if isinstance(value, list) else value


def _source(scope: Scope, link_id: int | None, seen: tuple = ()) -> list | Constant | None:
    """What a link brings: [node, output], a constant, or None where nothing comes."""
    if link_id is None or (scope.prefix, link_id) in seen:
        return None
    link, seen = scope.links[link_id], (*seen, (scope.prefix, link_id))
    if link.origin_id == SUBGRAPH_INPUT:
        return _from_outside(scope, link.origin_slot, seen)
    node = scope.nodes[link.origin_id]
    mode = node.get("mode", 0)
    if mode == MUTED:
        return None
    if mode == BYPASSED:
        return _bypass(scope, node, link.origin_slot, seen)
    if node["type"] == "Reroute":
        return _source(scope, node["inputs"][0].get("link"), seen)
    if node["type"] == "PrimitiveNode":
        return Constant(node["widgets_values"][0])
    if node["type"] in scope.subgraphs:
        return _from_inside(scope.enter(node), link.origin_slot, seen)
    return [f"{scope.prefix}{link.origin_id}", link.origin_slot]


def _from_outside(scope: Scope, slot: int, seen: tuple) -> list | Constant | None:
    name = scope.definition["inputs"][slot]["name"]
    socket = next((each for each in scope.holder.get("inputs", ()) if each["name"] == name), {})
    if socket.get("link") is None:
        return _own_value(scope, slot)
    return _source(scope.parent, socket["link"], seen)


def _own_value(scope: Scope, slot: int) -> Constant | None:
    """What the node of a subgraph itself has for an input: it keeps a value for each that feeds a widget inside."""
    fed = {
        link.origin_slot
        for link in scope.links.values()
        if link.origin_id == SUBGRAPH_INPUT
        and link.target_id in scope.nodes
        and "widget" in scope.nodes[link.target_id]["inputs"][link.target_slot]
    }
    values = dict(zip(sorted(fed), scope.holder.get("widgets_values") or (), strict=False))
    return Constant(values[slot]) if slot in values else None


def _from_inside(inner: Scope, slot: int, seen: tuple) -> list | Constant | None:
    ends = (number for number, link in inner.links.items() if link.target_id == SUBGRAPH_OUTPUT)
    link_id = next((number for number in ends if inner.links[number].target_slot == slot), None)
    return _source(inner, link_id, seen)


def _bypass(scope: Scope, node: dict, slot: int, seen: tuple) -> list | Constant | None:
    """What goes past a bypassed node: the input of the output's own place if the types agree, else the first such."""
    inputs, wanted = node.get("inputs", []), node["outputs"][slot]["type"]
    same_place = inputs[slot : slot + 1]
    for socket in (*same_place, *inputs):
        if socket["type"] == wanted or "*" in (socket["type"], wanted):
            return _source(scope, socket.get("link"), seen)
    return None
