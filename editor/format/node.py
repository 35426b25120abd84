"""A node of a workflow in the making, and what it gives to others."""

from typing import Any

from .schema import Input, inputs_of

OWN_PREFIX = "PixArt"
MOST_UNFOLDED = 6
WIDTH_PX = 270


class Node:
    """A node of a workflow. `node["latent"]` is the output of that name; the node itself stands for its first one."""

    def __init__(self, number: int, node_type: str, info: dict, title: str | None):
        self.number, self.type, self.info, self.title = number, node_type, info, title
        self.values: dict[str, Any] = {}
        self.sources: dict[str, Output] = {}
        self.labels: dict[str, str] = {}
        self.height_px: int | None = None
        self.is_subgraph = self.saves_all = False
        self.width_px = WIDTH_PX
        self.position = (0, 0)
        self.colours: tuple[str, str] = ("", "")

    def __getitem__(self, output: str) -> "Output":
        return Output(self, self.info["output_name"].index(output))

    def sockets(self) -> list[Input]:
        """The inputs that the editor saves: those without a widget, then the widgets that have a link or a label.

        A blueprint saves them all, in their order: by them the editor shows it before it is there.
        """
        inputs = inputs_of(self.info)
        if self.saves_all:
            return inputs
        linked = [each for each in inputs if each.is_widget and each.name in {*self.sources, *self.labels}]
        return [each for each in inputs if not each.is_widget] + linked

    def widgets(self) -> list[Input]:
        return [each for each in inputs_of(self.info) if each.is_widget]

    def folded(self) -> list[Input]:
        """The advanced inputs of a node of this pack that are as usual: hidden until they are asked for."""
        if not self.type.startswith(OWN_PREFIX):
            return []
        return [
            each
            for each in self.widgets()
            if each.is_advanced
            and each.name not in self.sources
            and self.values.get(each.name, each.default) == each.default
        ]

    @property
    def unfolds(self) -> bool:
        """Whether all advanced inputs are shown, because one of them is not as usual, and they are few."""
        advanced = [each for each in self.widgets() if each.is_advanced]
        changed = [each for each in advanced if each.name in self.values and each not in self.folded()]
        return self.type.startswith(OWN_PREFIX) and bool(changed) and len(advanced) <= MOST_UNFOLDED


class Output:
    """An output of a node, to be given as another's input."""

    def __init__(self, node: Node, slot: int):
        self.node, self.slot = node, slot
