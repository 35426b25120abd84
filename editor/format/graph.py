"""Writes a workflow as the editor saves it: nodes in the columns of titled groups, which read from left to right."""

import re
import uuid
from typing import Any

from ...devtools.process import ROOT
from .layout import lead_wires, place, size_of
from .node import OWN_PREFIX, Node, Output
from .released import Released
from .schema import Input, inputs_of

# The editor's own palette: (title, body, group).
COLOURS = {
    "models": ("#2a363b", "#3f5159", "#3f789e"),
    "prompt": ("#232", "#353", "#8A8"),
    "picture": ("#432", "#653", "#b58b2a"),
    "sampling": ("#323", "#535", "#a1309b"),
    "result": ("#233", "#355", "#8AA"),
    "training": ("#322", "#533", "#A88"),
    "notes": ("#222", "#000", "#999"),
}
NAMESPACE = uuid.UUID("6f2d1f0e-9a63-4a52-8f0c-3d5e7f1b2a90")
FORMAT_VERSION = 0.4


def _pack() -> dict[str, str]:
    """The pack as ComfyUI's registry knows it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    name, version = (re.search(rf'^{key} = "(.+)"$', text, re.MULTILINE)[1] for key in ("name", "version"))
    return {"cnr_id": name, "ver": version}


PACK = _pack()


class Workflow:
    """A workflow in the making: `group`, `column`, `node` and `note` add to it in the order of reading."""

    first_number = 1

    def __init__(self, name: str, object_info: dict):
        self.name, self.object_info = name, object_info
        self.nodes: list[Node] = []
        self.subgraphs: list[Any] = []
        self.page: dict[str, Any] = {}
        self.groups: list[tuple[str, str, list[list[Node]]]] = []

    def group(self, title: str, colour: str) -> None:
        """Start a group to the right of those before. colour: of COLOURS."""
        self.groups.append((title, colour, [[]]))

    def column(self) -> None:
        """Start another column in the group."""
        self.groups[-1][2].append([])

    def node(self, node_type: str, title: str | None = None, /, height_px: int | None = None, **inputs: Any) -> Node:
        """Add a node; inputs are Nodes, Outputs, values of widgets, or None to leave them as they are.

        Raises ValueError for names that the node does not have.
        """
        return self._connect(
            Node(len(self.nodes) + self.first_number, node_type, self.object_info[node_type], title), height_px, inputs
        )

    def insert(self, subgraph: Any, **inputs: Any) -> Node:
        """Add a Subgraph as a node; inputs as in `node`."""
        self.subgraphs.append(subgraph)
        node = Node(len(self.nodes) + self.first_number, subgraph.id, subgraph.info(), None)
        node.is_subgraph = True
        return self._connect(node, None, {**subgraph.values, **inputs})

    def _connect(self, node: Node, height_px: int | None, inputs: dict[str, Any]) -> Node:
        known = {each.name: each for each in inputs_of(node.info)}
        if unknown := inputs.keys() - known.keys():
            raise ValueError(f"Unknown inputs of {node.type}: got {sorted(unknown)}, expected of {sorted(known)}")
        for name, value in inputs.items():
            if value is None:
                continue
            if isinstance(value, Node):
                node.sources[name] = Output(value, 0)
            elif isinstance(value, Output):
                node.sources[name] = value
            else:
                node.values[name] = value
        node.height_px, node.colours = height_px, COLOURS[self.groups[-1][1]][:2]
        self._place(node)
        return node

    def note(self, text: str) -> None:
        """Add a note in Markdown."""
        widget = {"text": ["STRING", {"multiline": True}]}
        info = {"input": {"required": widget}, "output": [], "output_name": []}
        node = Node(len(self.nodes) + self.first_number, "MarkdownNote", info, "Note")
        node.values["text"], node.colours = text, COLOURS["notes"][:2]
        self._place(node)

    def _place(self, node: Node) -> None:
        self.nodes.append(node)
        self.groups[-1][2][-1].append(node)

    def present(self, inputs: list[tuple[Node, str, str]], outputs: list[Node]) -> None:
        """Let the editor open it as an app: a page of widgets, and of what nodes show. inputs: node, widget, label."""
        for node, widget, label in inputs:
            node.labels[widget] = label
        shown = [[node.number, widget] for node, widget, _ in inputs]
        self.page = {
            "linearMode": True,
            "linearData": {"inputs": shown, "outputs": [node.number for node in outputs]},
        }

    def to_editor(self) -> dict:
        """The workflow as the editor saves it."""
        groups, nodes, links = self.saved()
        reroutes, extensions = lead_wires(self.nodes, links)
        inner = [each.definition() for each in self.subgraphs]
        wires = {"reroutes": reroutes, "linkExtensions": extensions} if reroutes else {}
        return {
            "id": str(uuid.uuid5(NAMESPACE, self.name)),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": groups,
            **({"definitions": {"subgraphs": inner}} if inner else {}),
            "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [60, 100]}, **self.page, **wires},
            "version": FORMAT_VERSION,
        }

    def saved(self) -> tuple[list[dict], list[dict], list[list]]:
        """The groups, the nodes and the links."""
        boxes = place(self.groups)
        links, ends = [], {}
        for node in self.nodes:
            for slot, socket in enumerate(node.sockets()):
                if source := node.sources.get(socket.name):
                    kind = source.node.info["output"][source.slot]
                    links.append([len(links) + 1, source.node.number, source.slot, node.number, slot, kind])
                    ends[node.number, slot] = len(links)
        nodes = [self.saved_node(node, order, links, ends) for order, node in enumerate(self.nodes)]
        return [self._saved_group(number, box) for number, box in enumerate(boxes)], nodes, links

    def _saved_group(self, number: int, box: tuple) -> dict:
        title, colour, _ = self.groups[number]
        bounding = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        return {"id": number + 1, "title": title, "bounding": bounding, "color": COLOURS[colour][2], "flags": {}}

    def saved_node(self, node: Node, order: int, links: list, ends: dict) -> dict:
        inputs = []
        for slot, socket in enumerate(node.sockets()):
            saved = {"name": socket.name, "type": socket.type, "link": ends.get((node.number, slot))}
            optional = {"shape": 7} if socket.optional else {}
            label = {"label": node.labels[socket.name]} if socket.name in node.labels else {}
            inputs.append(
                {**saved, **optional, **label, **({"widget": {"name": socket.name}} if socket.is_widget else {})}
            )
        outputs = []
        for slot, (name, kind) in enumerate(zip(node.info["output_name"], node.info["output"], strict=True)):
            leaving = [link[0] for link in links if link[1:3] == [node.number, slot]]
            outputs.append({"name": name, "type": kind, "links": leaving or None})
        values = []
        for widget in node.widgets():
            values += [node.values.get(widget.name, widget.default), *self._extra_values(node, widget)]
        saved = {
            "id": node.number,
            "type": node.type,
            "pos": list(node.position),
            "size": list(size_of(node)),
            "flags": {},
            "order": order,
            "mode": 0,
            **({"showAdvanced": True} if node.unfolds else {}),
            "inputs": inputs,
            "outputs": outputs,
            **({"title": node.title} if node.title else {}),
            "properties": self._properties(node),
            "widgets_values": values,
        }
        return {**saved, "color": node.colours[0], "bgcolor": node.colours[1]}

    def _extra_values(self, node: Node, widget: Input) -> tuple:
        # A fixed seed: a shared workflow is to give everyone the picture that its thumbnail shows.
        return ("fixed",) if widget.extra_values == ("randomize",) else widget.extra_values

    def _properties(self, node: Node) -> dict:
        if node.type == "MarkdownNote":
            return {}
        models = [value.entry() for value in node.values.values() if isinstance(value, Released)]
        # By these the editor offers the pack to who opens the workflow without it.
        pack = PACK if node.type.startswith(OWN_PREFIX) else {}
        shown = {"previewExposures": []} if node.is_subgraph else {}  # as the editor adds it
        return {**pack, **shown, "Node name for S&R": node.type, **({"models": models} if models else {})}
