"""Another pack's nodes, where that pack is absent: replaced by ours in the editor, in prompts and in /object_info."""

import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from comfy_api import latest
from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from ...pixart.resolution import ASPECT_RATIOS

# ComfyUI_ExtraModels' names: of models, whose size is meant, and of ratios: width / height, a bin's mirrored.
FOREIGN_BASES = {
    "PixArt_XL_2": 512,
    "PixArtMS_XL_2": 1024,
    "PixArtMS_Sigma_XL_2": 1024,
    "PixArtMS_Sigma_XL_2_512": 512,
    "PixArtMS_Sigma_XL_2_2K": 2048,
}
FOREIGN_RATIOS = {f"{ratio:.2f}": ratio for ratio in ASPECT_RATIOS[1024]}

_CATEGORY = "PixArt/deprecated"
_SHARD = re.compile(r"-\d{5}-of-(\d{5}\.)")


@dataclass(frozen=True)
class Replacement:
    """A node that stands in for another pack's.

    widgets: the old node's widgets in their order. inputs: new input -> old. values: new input -> constant.
    outputs: so many of the old node's outputs are the new one's, in the same order.
    others: old inputs that are not the new node's, or that offer other choices, as ComfyUI describes inputs.
    """

    old: str
    new: str
    widgets: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)
    outputs: int = 1
    others: Mapping[str, tuple] = field(default_factory=dict)


class _Deprecated:
    """What the classes under the old ids have in common: each expands to the node that replaces it."""

    CATEGORY, FUNCTION, DEPRECATED = _CATEGORY, "expand", True
    replacement: Replacement

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        each = cls.replacement
        offered, olds = _inputs_of(each.new), {old: new for new, old in each.inputs.items()}
        names = dict.fromkeys([*(name for name in [*olds, *each.others] if name not in each.widgets), *each.widgets])
        described = {name: each.others.get(name) or _plain(offered.get(olds.get(name))) for name in names}
        return {"required": {name: described[name] for name in names if described[name]}}

    @classmethod
    def VALIDATE_INPUTS(cls, **_) -> bool:
        return True  # the node that it becomes judges the values

    def expand(self, **given) -> dict:
        graph = GraphBuilder()
        node = graph.node(self.replacement.new, **_new_inputs(self.replacement, given))
        return {"result": tuple(map(node.out, range(self.replacement.outputs))), "expand": graph.finalize()}


async def register_replacements(replacements: Iterable[Replacement]) -> None:
    """Tell the host's server. A host without replacements opens such graphs with missing nodes, as before."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)  # other programs have none
    instance = getattr(server, "instance", None)
    if instance is None:
        return
    replacements = tuple(replacements)
    instance.add_on_prompt_handler(lambda data: rename(data, replacements))

    async def offer(_app) -> None:
        offer_deprecated(replacements)

    instance.app.on_startup.append(offer)  # when all packs are loaded, in whatever order
    api = latest.ComfyAPI()
    if hasattr(io, "NodeReplace") and hasattr(api, "node_replacement"):
        for each in replacements:
            await api.node_replacement.register(_for_editor(each))


def _for_editor(each: Replacement) -> "io.NodeReplace":
    links = [{"new_id": new, "old_id": old} for new, old in each.inputs.items()]
    constants = [{"new_id": new, "set_value": value} for new, value in each.values.items()]
    # The old outputs' numbers are texts: the editor finds its links by them all the same, and the server, where the
    # links are right as they are, leaves them alone. With numbers it fails at links between two replaced nodes.
    return io.NodeReplace(
        new_node_id=each.new,
        old_node_id=each.old,
        old_widget_ids=list(each.widgets),
        input_mapping=links + constants,
        output_mapping=[{"new_idx": number, "old_idx": str(number)} for number in range(each.outputs)],
    )


def rename(data, replacements: Iterable[Replacement]):
    """A request to /prompt, whatever it is, with our nodes in place of the absent pack's. It changes the request.

    The host's own replacement fails on nodes without `_meta` and on inputs that are not given; what is missing here,
    the host's check names.
    """
    prompt = data.get("prompt") if isinstance(data, dict) else None
    by_id = {each.old: each for each in replacements if _is_ours_to_replace(each)}
    for number, node in prompt.items() if isinstance(prompt, dict) else ():
        kind = node.get("class_type") if isinstance(node, dict) else None
        if isinstance(kind, str) and kind in by_id:
            given = node.get("inputs")
            inputs = _new_inputs(by_id[kind], given if isinstance(given, dict) else {})
            prompt[number] = {**node, "class_type": by_id[kind].new, "inputs": inputs}
    return data


def offer_deprecated(replacements: Iterable[Replacement]) -> None:
    """Enter the old ids as deprecated nodes, for programs that look for them; none where any PixArt id is another's."""
    replacements = [each for each in replacements if each.new in _classes()]
    if any(each.old.startswith("PixArt") and not _is_ours_to_replace(each) for each in replacements):
        return
    module = sys.modules[__package__.partition(".nodes.")[0]]
    for each in filter(_is_ours_to_replace, replacements):
        new = _classes()[each.new]
        fields = {
            "replacement": each,
            "RETURN_TYPES": tuple(new.RETURN_TYPES[: each.outputs]),
            "DESCRIPTION": f"ComfyUI_ExtraModels' {each.old}: runs {each.new} of the PixArt pack in its place.",
            "RELATIVE_PYTHON_MODULE": f"custom_nodes.{os.path.basename(os.path.dirname(module.__file__))}",
        }
        _classes()[each.old] = type(each.old, (_Deprecated,), fields)


def _classes() -> dict[str, type]:
    return sys.modules["nodes"].NODE_CLASS_MAPPINGS  # ComfyUI's, which an import here would take for the pack's own


def _is_ours_to_replace(each: Replacement) -> bool:
    present = _classes().get(each.old)
    is_free = present is None or isinstance(present, type) and issubclass(present, _Deprecated)
    return is_free and each.new in _classes()


def _inputs_of(node_id: str) -> dict[str, tuple]:
    inputs = _classes()[node_id].INPUT_TYPES()
    return {**inputs.get("required", {}), **inputs.get("optional", {})}


def _plain(described: tuple | None) -> tuple | None:
    """An input as old programs read it: a list of choices in place of COMBO."""
    if described is None or described[0] != "COMBO":
        return described
    fields = dict(described[1])
    return list(fields.pop("options", ())), fields


def _new_inputs(each: Replacement, given: Mapping) -> dict:
    """The new node's inputs of those that are given."""
    offered = _inputs_of(each.new)
    links = {new: _known(given[old], _plain(offered.get(new))) for new, old in each.inputs.items() if old in given}
    return {**each.values, **links}


def _known(value, described: tuple | None):
    """A name of a file as this system writes it, or for a shard the folder that holds it, where they are offered."""
    if not isinstance(value, str) or not described or not isinstance(described[0], list) or value in described[0]:
        return value
    slashed = value.replace("\\", "/")
    folder = f"{slashed.rpartition('/')[0]}/"
    likely = (slashed, slashed.replace("/", os.sep), folder, _SHARD.sub(r"-00001-of-\1", slashed))
    return next((name for name in likely if name in described[0]), value)
