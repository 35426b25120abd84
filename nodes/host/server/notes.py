"""What a picture's metadata says in words that other programs know: written into each prompt, and so into its PNGs."""

import sys

from ....pixart.tracking.notes import KEY, to_fields
from ....pixart.tracking.run_log import describe_workflow
from .users import running_server

_OWN_PREFIX = "PixArt"


def register_notes() -> None:
    """Let every prompt that the editor sends say what makes its pictures, where one of this pack's nodes does."""
    found = running_server()
    if found is not None:
        found.add_on_prompt_handler(add_notes)


def add_notes(data):
    """A request to /prompt, whatever it is, with `parameters` beside the workflow in what goes into PNGs.

    The host's nodes write JSON there, which is SwarmUI's form. Where a graph makes several pictures in different ways,
    or a client has `parameters` of its own, nothing is added.
    """
    extra = data.get("extra_data") if isinstance(data, dict) else None
    written = extra.get("extra_pnginfo") if isinstance(extra, dict) else None
    prompt = data.get("prompt") if isinstance(data, dict) else None
    if not isinstance(written, dict) or KEY in written or not _is_graph(prompt):
        return data
    ways = [way for way in (_describe(prompt, number) for number in _ends(prompt)) if way]
    if ways and all(way == ways[0] for way in ways):
        written[KEY] = to_fields(ways[0])
    return data


def _is_graph(prompt) -> bool:
    if not isinstance(prompt, dict) or not prompt:
        return False
    nodes = [node for node in prompt.values() if isinstance(node, dict) and isinstance(node.get("inputs"), dict)]
    kinds = [node.get("class_type") for node in nodes]
    is_ours = any(isinstance(kind, str) and kind.startswith(_OWN_PREFIX) for kind in kinds)
    return is_ours and len(kinds) == len(prompt) and all(isinstance(kind, str) for kind in kinds)


def _ends(prompt: dict) -> list[str]:
    """The nodes that show or save pictures."""
    known = sys.modules["nodes"].NODE_CLASS_MAPPINGS
    return [
        number
        for number, node in prompt.items()
        if getattr(known.get(node["class_type"]), "OUTPUT_NODE", False) and "images" in node["inputs"]
    ]


def _describe(prompt: dict, number: str) -> dict | None:
    """What makes a node's pictures, None where nothing is sampled."""
    entry = describe_workflow(prompt, number)
    return entry if "steps" in entry or "solver" in entry else None
