"""Enters replacements of other packs' nodes into the host, which applies them where the other pack is absent."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from comfy_api import latest
from comfy_api.latest import io


@dataclass(frozen=True)
class Replacement:
    """A node that stands in for another pack's.

    widgets: the old node's widgets in their order. inputs: new input -> old. values: new input -> constant.
    outputs: so many of the old node's outputs are the new one's, in the same order.
    """

    old: str
    new: str
    widgets: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)
    outputs: int = 1


async def register_replacements(replacements: Iterable[Replacement]) -> None:
    """Tell the host's server. A host without replacements opens such graphs with missing nodes, as before."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)  # other programs have none
    api = latest.ComfyAPI() if getattr(server, "instance", None) is not None else None
    if not hasattr(io, "NodeReplace") or not hasattr(api, "node_replacement"):
        return
    for each in replacements:
        links = [{"new_id": new, "old_id": old} for new, old in each.inputs.items()]
        constants = [{"new_id": new, "set_value": value} for new, value in each.values.items()]
        # The old outputs' numbers are texts: the editor finds its links by them all the same, and the server, where the
        # links are right as they are, leaves them alone. With numbers it fails at links between two replaced nodes.
        replacement = io.NodeReplace(
            new_node_id=each.new,
            old_node_id=each.old,
            old_widget_ids=list(each.widgets),
            input_mapping=links + constants,
            output_mapping=[{"new_idx": number, "old_idx": str(number)} for number in range(each.outputs)],
        )
        await api.node_replacement.register(replacement)
