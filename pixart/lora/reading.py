"""Reads LoRA files of every layout as one: factors for rows of weights in the original layout."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..config import PixArtConfig
from ..files.inside import check_inside
from ..quoting import list_names, shorten
from ..weights.checking import expected_shapes
from ..weights.folders import read_json
from ..weights.reading import read_tensors
from .alphas import LARGEST, PEFT_CONFIG, Settings, stored_config
from .building import Module, build
from .by_peft import is_for_peft, merge_with_peft
from .kinds import Difference, Factor
from .names import TEXT_ENCODER_PREFIXES, Target, describe_prefix, parse_key, resolve_name
from .relative import Shared
from .remarks import find_assumptions, find_missing, name_kind, require_complete, require_readable

# Of a PEFT folder, best first; the last ones are the diffusers form that the original's script puts beside it.
PEFT_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
SHARED_KEYS = ("base_model.vera_A", "base_model.vera_B")


@dataclass(frozen=True, eq=False)
class LoRA:
    """What a LoRA changes, and how it was read.

    factors: rows of a weight -> their change. matched: how many of the file's keys went into them.
    unmatched, text_encoder: keys that mean nothing in this model, and those of a text encoder.
    layouts: whose names the file has; alpha_sources: where its alphas are from; both in words.
    metadata: the texts of the file's header. missing: what the configuration names and the file has not, in words.
    assumed: what the file does not say, in words.
    """

    factors: dict[Target, Factor]
    matched: int = 0
    unmatched: tuple[str, ...] = ()
    text_encoder: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    alpha_sources: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def shortfall(self) -> str:
        """In words, why this changes a model in another way than the file does; "" where it is all in."""
        left = len(self.unmatched) + len(self.text_encoder)
        parts = [f"{self.matched} of {self.matched + left} keys"] if left else []
        parts += [f"without {each}" for each in self.missing]
        return f"{', '.join(parts)}; what is missing changes the result" if parts else ""


def read_lora(
    path: str | os.PathLike, config: PixArtConfig | None = None, alpha: float | None = None, strict: bool = False
) -> LoRA:
    """Read a LoRA from a file or a PEFT folder; see `load_lora`, also for what is raised.

    strict: refuse, as a ValueError, a file that goes in only in part.

    A folder may hold one named adapter in a folder of its own, as PEFT saves it.
    A file that lies in a PEFT folder under one of its names is read with the folder's adapter_config.json.
    Raises FileNotFoundError when there is no such file, or none in the folder, and ValueError for a link that leads
    out of the folder.
    """
    path = file = Path(path)
    if path.is_dir():
        file = _find_weights(path)
    beside = file.parent / PEFT_CONFIG
    adapter_config = read_json(beside) if file.name in PEFT_WEIGHTS and beside.is_file() else None
    tensors, metadata = read_tensors(file)
    try:
        lora = load_lora(tensors, adapter_config, config=config, metadata=metadata, alpha=alpha)
        if strict and lora.shortfall:
            left = list_names((*lora.unmatched, *lora.text_encoder)) or "none left over"
            raise ValueError(
                f"LoRA that fits only in part: got {lora.shortfall} (keys: {left}), expected all of it, since strict "
                f"is on. Switch strict off to use what fits."
            )
        return lora
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _find_weights(folder: Path) -> Path:
    """The file of a PEFT folder, or of the one named adapter in it."""
    found = _weights_in(folder)
    if found is None:
        inner = [each for each in sorted(folder.iterdir()) if each.is_dir() and _weights_in(each)]
        if len(inner) > 1:
            raise ValueError(
                f"Several LoRAs in folder {shorten(folder.name)}: got {list_names([each.name for each in inner])}, "
                f"expected one. Choose one of these folders."
            )
        found = _weights_in(inner[0]) if inner else None
    if found is None:
        raise FileNotFoundError(
            f"No LoRA in folder {shorten(folder.name)}: got none of {', '.join(PEFT_WEIGHTS)}, expected one of them. "
            f"Choose a folder that PEFT saved, or the LoRA's file."
        )
    return check_inside(found, folder)


def _weights_in(folder: Path) -> Path | None:
    return next((folder / name for name in PEFT_WEIGHTS if (folder / name).is_file()), None)


def load_lora(
    state_dict: Mapping[str, torch.Tensor],
    adapter_config: Mapping | None = None,
    *,
    config: PixArtConfig | None = None,
    metadata: Mapping[str, str] | None = None,
    alpha: float | None = None,
) -> LoRA:
    """Recognise the keys of a LoRA file, each in whatever layout it is.

    adapter_config: PEFT's adapter_config.json; without it, the same from `metadata`, the texts of the file's header.
    config: of the model that the LoRA must fit; None takes every PixArt. alpha: in place of what the file says.
    The alpha of a key is the file's; else the configuration's with its patterns and use_rslora; else 8 under PEFT's
    names, whose files never hold one; else the rank.
    Raises ValueError when no key is a PixArt's, when factors do not fit each other, the model or use_dora, and for
    PEFT's ways of training that change the base as well.
    """
    settings = Settings(adapter_config or stored_config(metadata), alpha)
    shapes = None if config is None else expected_shapes(config)
    require_readable(settings.peft)
    factors, used, layouts, sources = {}, set(), Counter(), Counter()
    if is_for_peft(settings.peft, state_dict):
        factors, used = merge_with_peft(state_dict, settings.peft, shapes)
        layouts["PEFT"] += 1
    groups, shared, unmatched, text_encoder = _group_keys(
        {key: tensor for key, tensor in state_dict.items() if key not in used}
    )
    for name, tensors in groups.items():
        target, prefix = resolve_name(name) or (None, "")
        own = name.removeprefix(prefix)
        values = {role: tensor for role, (_, tensor) in tensors.items()}
        made = {} if target is None else build(Module(target, own, values, settings, shared))
        made = {
            place: found
            for place, found in made.items()
            if place not in factors and (shapes is None or place.name in shapes)
        }
        spent = set().union(*(roles for _, roles in made.values()))
        for place, (factor, _) in made.items():
            factors[place], source = settings.with_alpha(factor, prefix, own)
            sources[source] += 1
            if isinstance(factor, Shared):
                used |= {key for key in state_dict if key.endswith(SHARED_KEYS)}
        if "up_bias" in spent:  # PEFT's lora_bias, scaled as the product
            factors[target.bias] = Difference(made[target.bias][0].values.float() * factors[target].scale)
        used |= {tensors[role][0] for role in spent}
        layouts.update([describe_prefix(prefix)] if made else [])
    unmatched += [key for tensors in groups.values() for key, _ in tensors.values() if key not in used]
    unmatched = tuple(key for key in unmatched if key not in used)
    lora = LoRA(
        factors, len(used), unmatched, tuple(text_encoder), tuple(layouts), tuple(sources), dict(metadata or {})
    )
    _require_match(lora, state_dict)
    _check_factors(lora, shapes)
    require_complete(settings.peft, factors)
    missing, assumed = find_missing(settings.peft, state_dict), find_assumptions(settings, sources, factors)
    return replace(lora, missing=tuple(missing), assumed=tuple(assumed))


def _group_keys(state_dict: Mapping[str, torch.Tensor]) -> tuple[dict, dict, list[str], list[str]]:
    """({module's name: {role: (key, tensor)}}, tensors for all modules, unmatched keys, a text encoder's keys).

    Tensors for all modules are unmatched until one uses them.
    """
    groups: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    shared, unmatched, text_encoder = {}, [], []
    may_be_empty = any("lora_E" in key for key in state_dict)
    for key, tensor in state_dict.items():
        parsed = parse_key(key)
        if key.endswith(SHARED_KEYS) and tensor.ndim == 2:
            shared[key.rpartition(".")[2]] = tensor
        if key.startswith(TEXT_ENCODER_PREFIXES):
            text_encoder.append(key)
        elif parsed is None or not _usable(parsed[1], tensor, may_be_empty) or parsed[1] in groups.get(parsed[0], ()):
            unmatched.append(key)
        else:
            groups.setdefault(parsed[0], {})[parsed[1]] = key, tensor
    return groups, shared, unmatched, text_encoder


def _usable(role: str, tensor: torch.Tensor, may_be_empty: bool) -> bool:
    if role == "alpha":
        return tensor.numel() == 1 and not tensor.is_complex() and abs(float(tensor)) < LARGEST
    if role == "on_input":
        return tensor.numel() == 1
    return tensor.dtype.is_floating_point and tensor.ndim > 0 and (tensor.numel() > 0 or may_be_empty)


def _require_match(lora: LoRA, state_dict: Mapping) -> None:
    if lora.factors:
        return
    if lora.text_encoder and not lora.unmatched:
        raise ValueError(
            f"LoRA of a text encoder alone: got {_some(lora.text_encoder)}, expected keys of a PixArt transformer. "
            f"Load it onto the CLIP with ComfyUI's own LoRA loader."
        )
    kind = name_kind(lora.unmatched)
    if kind is not None:
        raise ValueError(
            f"Adapter that its tensors alone do not tell: got {kind} without its {PEFT_CONFIG}, expected it beside the "
            f"file. Put the file back into the folder that PEFT saved, or merge it into the model with PEFT."
        )
    raise ValueError(
        f"No key of this LoRA is a PixArt's: got {len(state_dict)} keys such as {_some(lora.unmatched) or 'none'}, "
        f"expected names like 'transformer_blocks.0.attn1.to_q.lora_A.weight'. Choose a LoRA that was trained on "
        f"PixArt-alpha or PixArt-Sigma."
    )


def _check_factors(lora: LoRA, shapes: Mapping[str, tuple[int, ...]] | None) -> None:
    for target, factor in lora.factors.items():
        wanted = None if shapes is None else target.shape(shapes[target.name])
        if not factor.is_whole or wanted is not None and not factor.fits(wanted):
            shape = (
                f"a change of shape {factor.product_shape}" if factor.product_shape else f"{factor.title} of another"
            )
            got = shape if factor.is_whole else "factors that do not belong together"
            if factor.is_whole and factor.magnitude is not None and factor.product_shape == wanted:
                got = f"{factor.magnitude.numel()} magnitudes"
            raise ValueError(
                f"LoRA width mismatch at {shorten(target.name)}: got {got}, expected {wanted or 'one matrix'}. Choose "
                f"a LoRA that was trained on this PixArt model."
            )
        if not factor.is_finite:
            raise ValueError(
                f"Broken LoRA at {shorten(target.name)}: got infinite values or no numbers, expected finite ones. Its "
                f"training went wrong: choose an earlier checkpoint of it."
            )


def _some(names: tuple[str, ...], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(shorten, names[:limit])) + more
