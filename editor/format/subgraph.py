"""A subgraph: nodes that stand in a workflow as one, with the few inputs that matter, and blueprints made of one."""

import uuid
from typing import Any

from .graph import COLOURS, FORMAT_VERSION, NAMESPACE, Workflow
from .layout import COLUMN_GAP_PX, GROUP_TITLE_PX, SLOT_PX, lead_wires
from .node import Node, Output
from .schema import inputs_of

FROM_OUTSIDE, TO_OUTSIDE = -10, -20  # the numbers of what stands for the inputs and for the outputs
EDGE_PX, BLUEPRINT_PX = 130, 320  # widths of those, and of a blueprint's node


class Subgraph(Workflow):
    """A workflow in a workflow. `input` makes what nodes are fed from outside, `output` what goes out."""

    first_number = 101  # the editor renumbers nodes that have the number of one outside

    def __init__(self, workflow: Workflow, title: str, description: str, category: str = "PixArt"):
        super().__init__(f"{workflow.name}/{title}", workflow.object_info)
        self.title, self.description, self.category = title, description, category
        self.id = str(uuid.uuid5(NAMESPACE, self.name))
        self.described: dict[str, list] = {}
        self.values: dict[str, Any] = {}
        self.outside = Node(FROM_OUTSIDE, "inputs", {"output": [], "output_name": []}, None)
        self.results: dict[str, Output] = {}

    def input(self, name: str, of: str, widget: str | None = None, value: Any = None) -> Output:
        """Add an input. of: a type such as MODEL, or of which node this is the widget. value: what it begins with."""
        described = [of, {}]
        if widget:
            found = next(each for each in inputs_of(self.object_info[of]) if each.name == widget)
            described = [found.type, {**found.options, "advanced": False, "control_after_generate": False}]
            self.values[name] = found.default if value is None else value
        self.described[name] = described
        self.outside.info["output"].append(described[0])
        self.outside.info["output_name"].append(name)
        return Output(self.outside, len(self.described) - 1)

    def output(self, name: str, source: Node | Output) -> None:
        self.results[name] = source if isinstance(source, Output) else Output(source, 0)

    def node(self, node_type: str, title: str | None = None, /, height_px: int | None = None, **inputs: Any) -> Node:
        node = super().node(node_type, title, height_px, **inputs)
        for name, source in node.sources.items():
            if source.node is self.outside and (key := list(self.described)[source.slot]) in self.values:
                node.values[name] = self.values[key]
        return node

    def info(self) -> dict:
        """What /object_info would say of a node with this inside."""
        kinds = [result.node.info["output"][result.slot] for result in self.results.values()]
        return {"input": {"required": self.described}, "output": kinds, "output_name": list(self.results)}

    def definition(self) -> dict:
        """The subgraph as a workflow's `definitions` have it."""
        groups, nodes, links = self.saved()
        right = max(x + width for x, _, width, _ in (group["bounding"] for group in groups))
        ends = [[TO_OUTSIDE, slot, result] for slot, result in enumerate(self.results.values())]
        for number, slot, result in ends:
            kind = result.node.info["output"][result.slot]
            links.append([len(links) + 1, result.node.number, result.slot, number, slot, kind])
            saved = next(node for node in nodes if node["id"] == result.node.number)["outputs"][result.slot]
            saved["links"] = [*(saved["links"] or ()), len(links)]
        left = -EDGE_PX - COLUMN_GAP_PX
        starts = {
            (FROM_OUTSIDE, slot): (left + EDGE_PX, GROUP_TITLE_PX + (slot + 1) * SLOT_PX)
            for slot in range(len(self.described))
        }
        reroutes, extensions = lead_wires(self.nodes, [link for link in links if link[3] != TO_OUTSIDE], starts)
        parents = {each["id"]: {"parentId": each["parentId"]} for each in extensions}
        names = "id", "origin_id", "origin_slot", "target_id", "target_slot", "type"
        return {
            "id": self.id,
            "version": 1,
            "state": {
                "lastGroupId": len(groups),
                "lastNodeId": max(node["id"] for node in nodes),
                "lastLinkId": len(links),
                "lastRerouteId": len(reroutes),
            },
            "revision": 0,
            "config": {},
            "name": self.title,
            "inputNode": {"id": FROM_OUTSIDE, "bounding": self._edge(left, len(self.described))},
            "outputNode": {"id": TO_OUTSIDE, "bounding": self._edge(right + COLUMN_GAP_PX, len(self.results))},
            "inputs": self._ends("in", [(name, kind[0]) for name, kind in self.described.items()], links, 1),
            "outputs": self._ends("out", list(zip(self.results, self.info()["output"], strict=True)), links, 3),
            "widgets": [],
            "nodes": nodes,
            "groups": groups,
            "links": [dict(zip(names, link, strict=True)) | parents.get(link[0], {}) for link in links],
            "reroutes": reroutes,
            "extra": {},
            "category": self.category,
            "description": self.description,
        }

    def _edge(self, x: float, count: int) -> list[float]:
        return [x, GROUP_TITLE_PX, EDGE_PX, (count + 2) * SLOT_PX]

    def _ends(self, side: str, ends: list[tuple[str, str]], links: list[list], place: int) -> list[dict]:
        number = FROM_OUTSIDE if side == "in" else TO_OUTSIDE
        return [
            {
                "id": str(uuid.uuid5(NAMESPACE, f"{self.name}/{side}/{name}")),
                "name": name,
                "type": kind,
                "linkIds": [link[0] for link in links if link[place : place + 2] == [number, slot]],
            }
            for slot, (name, kind) in enumerate(ends)
        ]


def to_blueprint(inside: Subgraph) -> dict:
    """The file of `subgraphs/` by which the editor offers a subgraph as a node."""
    holder = Node(1, inside.id, inside.info(), inside.title)
    holder.values, holder.is_subgraph, holder.saves_all = dict(inside.values), True, True
    holder.width_px, holder.colours = BLUEPRINT_PX, COLOURS["sampling"][:2]
    saved = inside.saved_node(holder, 0, [], {})
    return {
        "id": str(uuid.uuid5(NAMESPACE, f"{inside.name}/blueprint")),
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [saved],
        "links": [],
        "groups": [],
        "definitions": {"subgraphs": [inside.definition()]},
        "config": {},
        "extra": {"BlueprintDescription": inside.description},
        "version": FORMAT_VERSION,
    }
