"""Key layouts of PixArt ControlNets: part a combined file, and map between the original's and diffusers' names.

Nothing here opens a file, as in `layouts.py`, whose names of the blocks' tensors hold here too.
"""

import re
from collections.abc import Callable, Mapping

from ..quoting import shorten
from .layouts import (
    CONFIG_KEY,
    CONTROL,
    CONTROLNET,
    DIFFUSERS,
    ORIGINAL,
    Weights,
    advice,
    describe,
    original_tensors,
)
from .wrappers import identify, identify_pixart
from .wrappers import to_diffusers as model_to_diffusers
from .wrappers import to_original as model_to_original

# Either layout's name of a control tensor: (block, name inside the copied block) or (block, projection).
_NAME = re.compile(
    r"(?:controlnet\.)?(?:(?:controlnet_blocks\.)(?P<theirs>\d{1,4})\.(?:transformer_block\.(?P<inner>.+)|(?P<outer>.+))"
    r"|(?P<ours>\d{1,4})\.(?:copied_block\.(?P<copied>.+)|(?P<projection>.+)))"
)
_PROJECTION = re.compile(r"(?:before|after)_proj\.(?:weight|bias)")
_BLOCK = re.compile(r"(?:transformer_)?blocks\.(\d+)\.(.+)")


def split_controlnet(state_dict: Mapping) -> tuple[dict, dict]:
    """Part a ControlNet file: (base weights, control weights named `{i}.copied_block...`), both in original layout.

    Either layout is taken, wrapped or not. The base is empty when the file holds control weights alone.
    Raises ValueError for weights of another kind, and naming every unknown key.
    """
    base, control = part_controlnet(identify_control(state_dict))
    return (original_tensors(base) if base else {}), control


def part_controlnet(weights: Weights) -> tuple[Weights | None, dict]:
    """As `split_controlnet`, of weights that are identified, with the base as it stands in the file: its position grid
    shows the trained size. The base is None when the file holds control weights alone.
    """
    tensors = {name: value for name, value in weights.tensors.items() if name != CONFIG_KEY}
    control = {name: value for name, value in tensors.items() if _NAME.fullmatch(name)}
    base = {name: value for name, value in tensors.items() if name not in control}
    found = identify_pixart(base, metadata=weights.metadata) if base else None
    return found, _rename(control, model_to_original, "{}.copied_block.", "{}.")


def control_to_original(state_dict: Mapping) -> dict:
    """The control weights of a file in either layout, named as in the original's: `controlnet.0.copied_block...`.

    Raises ValueError for weights of another kind, naming every unknown key.
    """
    return {f"controlnet.{name}": value for name, value in split_controlnet(state_dict)[1].items()}


def control_to_diffusers(state_dict: Mapping) -> dict:
    """The control weights of a file in either layout, named `controlnet_blocks.0.transformer_block...`.

    Raises ValueError for weights of another kind, naming every unknown key and every tensor whose rows cannot be cut.
    Source: diffusers, examples/research_projects/pixart; SimpleTuner names them alike.
    """
    control = split_controlnet(state_dict)[1]
    stem = "controlnet_blocks.{}."
    return _rename(control, model_to_diffusers, stem + "transformer_block.", stem)


def identify_control(content: object, weights: str = "ema", metadata: Mapping[str, str] | None = None) -> Weights:
    """As `identify`, of a ControlNet: CONTROLNET or CONTROL. Raises ValueError saying what the weights are else."""
    found = identify(content, weights, metadata, control=True)
    layout = found.layout
    if layout not in (CONTROLNET, CONTROL):
        remedy = advice(layout) if layout in (ORIGINAL, DIFFUSERS) else "Choose a PixArt ControlNet file."
        raise ValueError(
            f"Not a PixArt ControlNet: got {describe(layout)}, expected PixArt ControlNet weights. {remedy}"
        )
    return found


def _rename(control: Mapping, convert: Callable[[Mapping], dict], block_stem: str, projection_stem: str) -> dict:
    """Control weights of either layout under new names; `convert` maps those of the copied blocks as a model's."""
    blocks, projections, unknown = {}, {}, []
    for name, value in control.items():
        match = _NAME.fullmatch(name)
        inner, outer = match["inner"] or match["copied"], match["outer"] or match["projection"]
        if inner and match["theirs"]:
            blocks[f"transformer_blocks.{match['theirs']}.{inner}"] = value
        elif inner:
            blocks[f"blocks.{match['ours']}.{inner}"] = value
        elif _PROJECTION.fullmatch(outer):
            projections[projection_stem.format(match["theirs"] or match["ours"]) + outer] = value
        else:
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(
            f"Unknown weights: got {shorten(unknown[0])}{more}, expected the names of a PixArt ControlNet. Choose a "
            f"PixArt ControlNet file."
        )
    found = {}
    for name, value in (convert(blocks) if blocks else {}).items():
        match = _BLOCK.fullmatch(name)
        found[block_stem.format(match[1]) + match[2]] = value
    return found | projections
