"""Writes a workflow as the editor saves it: nodes in the columns of titled groups, which read from left to right."""

import re
import uuid
from typing import Any

from ...devtools.process import ROOT
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
TITLE_PX, SLOT_PX, WIDGET_PX, LINE_PX = 30, 20, 24, 18
MARGIN_PX, GAP_PX = 15, 40  # inside a group, and between nodes
GROUP_TITLE_PX = 44
GROUP_GAP_PX = 30
NODE_PX, NOTE_PX = 300, 320
# What a node shows below its widgets once it has run: a picture, the preview of one, or a line of text.
PICTURE_PX, PREVIEW_PX, CHART_PX, TEXT_PX = 340, 240, 220, 70
SHOWN_PX = {
    **dict.fromkeys(("SaveImage", "PreviewImage", "LoadImage", "PixArtCompareSheet"), PICTURE_PX),
    **dict.fromkeys(("KSampler", "SamplerCustom", "SamplerCustomAdvanced"), PREVIEW_PX),
    **dict.fromkeys(("PixArtResolution", "PixArtScheduler"), CHART_PX),
    "PixArtEncodeDataset": TEXT_PX + PREVIEW_PX,
}
NAMESPACE = uuid.UUID("6f2d1f0e-9a63-4a52-8f0c-3d5e7f1b2a90")
FORMAT_VERSION = 0.4
OWN_PREFIX = "PixArt"


def _pack() -> dict[str, str]:
    """The pack as ComfyUI's registry knows it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    name, version = (re.search(rf'^{key} = "(.+)"$', text, re.MULTILINE)[1] for key in ("name", "version"))
    return {"cnr_id": name, "ver": version}


PACK = _pack()


class Node:
    """A node of a workflow. `node["latent"]` is the output of that name; the node itself stands for its first one."""

    def __init__(self, number: int, node_type: str, info: dict, title: str | None):
        self.number, self.type, self.info, self.title = number, node_type, info, title
        self.values: dict[str, Any] = {}
        self.sources: dict[str, Output] = {}
        self.height_px: int | None = None
        self.width_px = NODE_PX
        self.position = (0, 0)
        self.colours: tuple[str, str] = ("", "")

    def __getitem__(self, output: str) -> "Output":
        return Output(self, self.info["output_name"].index(output))

    def sockets(self) -> list[Input]:
        """The inputs that the editor saves: those without a widget, then the widgets that a link feeds."""
        inputs = inputs_of(self.info)
        linked = [each for each in inputs if each.is_widget and each.name in self.sources]
        return [each for each in inputs if not each.is_widget] + linked

    def widgets(self) -> list[Input]:
        return [each for each in inputs_of(self.info) if each.is_widget]

    def size(self) -> tuple[int, int]:
        """Width and height in pixels, the title not counted."""
        sockets = [each for each in inputs_of(self.info) if not each.is_widget]
        slots = max(len(sockets), len(self.info["output"]))
        height = slots * SLOT_PX + (14 if self.widgets() else 6)
        for widget in self.widgets():
            text = str(self.values.get(widget.name, "")) if widget.is_multiline else ""
            rows = sum(1 + len(line) // 40 for line in text.splitlines())
            plain = WIDGET_PX * (1 + len(widget.extra_values))
            height += max(54, 20 + LINE_PX * rows) if widget.is_multiline else plain
        says = "UNIQUE_ID" in str(self.info["input"].get("hidden"))
        height += SHOWN_PX.get(self.type, TEXT_PX if says else 0)
        return self.width_px, max(height, self.height_px or 0)


class Output:
    """An output of a node, to be given as another's input."""

    def __init__(self, node: Node, slot: int):
        self.node, self.slot = node, slot


class Workflow:
    """A workflow in the making: `group`, `column`, `node` and `note` add to it in the order of reading."""

    def __init__(self, name: str, object_info: dict, files: dict[str, dict]):
        """files: by the names of model files, what the editor's dialog of missing models is to say of them."""
        self.name, self.object_info, self.files = name, object_info, files
        self.nodes: list[Node] = []
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
        node = Node(len(self.nodes) + 1, node_type, self.object_info[node_type], title)
        known = {each.name: each for each in inputs_of(node.info)}
        if unknown := inputs.keys() - known.keys():
            raise ValueError(f"Unknown inputs of {node_type}: got {sorted(unknown)}, expected of {sorted(known)}")
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
        node = Node(len(self.nodes) + 1, "MarkdownNote", info, "Note")
        node.values["text"] = text
        node.width_px, node.colours = NOTE_PX, COLOURS["notes"][:2]
        rows = sum(1 + len(line) // 44 for line in text.splitlines())
        node.height_px = 60 + 14 * rows
        self._place(node)

    def _place(self, node: Node) -> None:
        self.nodes.append(node)
        self.groups[-1][2][-1].append(node)

    def to_editor(self) -> dict:
        """The workflow as the editor saves it."""
        groups = self._lay_out()
        links, nodes = [], []
        ends = {}
        for node in self.nodes:
            for slot, socket in enumerate(node.sockets()):
                if source := node.sources.get(socket.name):
                    kind = source.node.info["output"][source.slot]
                    links.append([len(links) + 1, source.node.number, source.slot, node.number, slot, kind])
                    ends[node.number, slot] = len(links)
        for order, node in enumerate(self.nodes):
            nodes.append(self._saved_node(node, order, links, ends))
        return {
            "id": str(uuid.uuid5(NAMESPACE, self.name)),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": groups,
            "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [60, 100]}},
            "version": FORMAT_VERSION,
        }

    def _lay_out(self) -> list[dict]:
        """Give every node its place; returns the groups."""
        saved, left = [], 0
        for number, (title, colour, columns) in enumerate(self.groups, start=1):
            x, bottom = left + MARGIN_PX, 0
            for column in columns:
                y = GROUP_TITLE_PX + TITLE_PX
                for node in column:
                    node.position = (x, y)
                    y += node.size()[1] + GAP_PX + TITLE_PX
                bottom = max(bottom, y - GAP_PX - TITLE_PX)
                x += max(node.size()[0] for node in column) + GAP_PX
            width = x - GAP_PX + MARGIN_PX - left
            bounding = [left, 0, width, bottom + MARGIN_PX]
            saved.append({"id": number, "title": title, "bounding": bounding, "color": COLOURS[colour][2], "flags": {}})
            left += width + GROUP_GAP_PX
        return saved

    def _saved_node(self, node: Node, order: int, links: list, ends: dict) -> dict:
        inputs = []
        for slot, socket in enumerate(node.sockets()):
            saved = {"name": socket.name, "type": socket.type, "link": ends.get((node.number, slot))}
            optional = {"shape": 7} if socket.optional else {}
            inputs.append({**saved, **optional, **({"widget": {"name": socket.name}} if socket.is_widget else {})})
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
            "size": list(node.size()),
            "flags": {},
            "order": order,
            "mode": 0,
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
        named = [value for value in node.values.values() if isinstance(value, str) and value in self.files]
        models = [{"name": name, **self.files[name]} for name in named]
        # By these the editor offers the pack to who opens the workflow without it.
        pack = PACK if node.type.startswith(OWN_PREFIX) else {}
        return {**pack, "Node name for S&R": node.type, **({"models": models} if models else {})}
