"""Reads LoRA files of every layout as one: factors for rows of weights in the original layout."""

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

import torch

from ..config import PixArtConfig
from ..files.documents import parse_json
from ..files.inside import check_inside
from ..files.patterns import compile_pattern
from ..quoting import shorten
from ..weights.checking import expected_shapes
from ..weights.folders import read_json
from ..weights.reading import read_tensors
from .kinds import Difference, Factor, Hadamard, Kronecker, LowRank
from .names import TEXT_ENCODER_PREFIXES, Target, describe_prefix, parse_key, resolve_name

PEFT_ALPHA = 8.0  # PEFT's own default, which the original's training script leaves as it is
PEFT_CONFIG = "adapter_config.json"
# Of a PEFT folder, best first; the last ones are the diffusers form that the original's script puts beside it.
PEFT_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
HEADER_KEY = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration in a file's header
# PEFT's initialisations that take the adapter's first product out of the base, which is then another model.
_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")
_LARGEST = 1e9  # no alpha or rank comes near it; NaN is not below it either


@dataclass(frozen=True, eq=False)
class LoRA:
    """What a LoRA changes, and how it was read.

    factors: rows of a weight -> their change. matched: how many of the file's keys went into them.
    unmatched, text_encoder: keys that mean nothing in this model, and those of a text encoder.
    layouts: whose names the file has; alpha_sources: where its alphas are from; both in words.
    metadata: the texts of the file's header.
    """

    factors: dict[Target, Factor]
    matched: int = 0
    unmatched: tuple[str, ...] = ()
    text_encoder: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    alpha_sources: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_lora(path: str | os.PathLike, config: PixArtConfig | None = None, alpha: float | None = None) -> LoRA:
    """Read a LoRA from a file or a PEFT folder; see `load_lora`, also for what is raised.

    A file that lies in a PEFT folder under one of its names is read with the folder's adapter_config.json.
    Raises FileNotFoundError when there is no such file, or none in the folder, and ValueError for a link that leads
    out of the folder.
    """
    path = file = Path(path)
    if path.is_dir():
        found = [path / name for name in PEFT_WEIGHTS if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(
                f"No LoRA in folder {shorten(path.name)}: got none of {', '.join(PEFT_WEIGHTS)}, expected one of them. "
                f"Choose a folder that PEFT saved, or the LoRA's file."
            )
        file = check_inside(found[0], path)
    beside = file.parent / PEFT_CONFIG
    adapter_config = read_json(beside) if file.name in PEFT_WEIGHTS and beside.is_file() else None
    tensors, metadata = read_tensors(file)
    try:
        return load_lora(tensors, adapter_config, config=config, metadata=metadata, alpha=alpha)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


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
    settings = _Settings(adapter_config or _stored_config(metadata), alpha)
    shapes = None if config is None else expected_shapes(config)
    groups, unmatched, text_encoder = _group_keys(state_dict)
    factors: dict[Target, Factor] = {}
    matched, layouts, sources = 0, Counter(), Counter()
    for name, tensors in groups.items():
        target, prefix = resolve_name(name) or (None, "")
        made = {} if target is None else _make_factors(target, tensors)
        made = {
            place: factor
            for place, factor in made.items()
            if place not in factors and (shapes is None or place.name in shapes)
        }
        spent = {role for factor in made.values() for role in _roles_of(factor, tensors)}
        unmatched += [key for role, (key, _) in tensors.items() if role not in spent]
        if made:
            for place, factor in made.items():
                factors[place], source = settings.with_alpha(factor, prefix, name.removeprefix(prefix))
                sources[source] += 1
            if "up_bias" in spent:  # PEFT's lora_bias, scaled as the product
                factors[target.bias] = Difference(made[target.bias].values.float() * factors[target].scale)
            matched += len(spent)
            layouts[describe_prefix(prefix)] += 1
    texts = dict(metadata or {})
    lora = LoRA(factors, matched, tuple(unmatched), tuple(text_encoder), tuple(layouts), tuple(sources), texts)
    _require_match(lora, state_dict)
    _check_factors(lora, shapes, settings)
    return lora


class _Settings:
    """Where the alphas come from. peft: the content of adapter_config.json or {}; chosen: overrules everything."""

    def __init__(self, peft: Mapping, chosen: float | None):
        self.peft = peft
        self.chosen = chosen
        self.use_dora = peft.get("use_dora") is True

    def with_alpha(self, factor: Factor, prefix: str, module: str) -> tuple[Factor, str]:
        """The factor with its alpha, and where that is from, in words. module: its name without `prefix`."""
        if isinstance(factor, Difference):
            return factor, "none"
        if self.chosen is not None:
            return replace(factor, alpha=self.chosen), "chosen by you"
        if factor.alpha is not None:
            return factor, "stored in the file"
        if self.peft:
            rooted = ", times the root of the rank by use_rslora" if self.peft.get("use_rslora") is True else ""
            return self._from_peft(factor, module), PEFT_CONFIG + rooted
        if "base_model.model." in prefix:
            return replace(factor, alpha=PEFT_ALPHA), "PEFT's default, since the file has none"
        return replace(factor, alpha=factor.rank), "the rank, since the file has none"

    def _from_peft(self, factor: Factor, module: str) -> Factor:
        alpha = _number(self.peft.get("lora_alpha", self.peft.get("alpha")), PEFT_ALPHA)
        alpha = self._pattern("alpha_pattern", module, alpha)
        rank = factor.rank or int(self._pattern("rank_pattern", module, _number(self.peft.get("r"), alpha)))
        if self.peft.get("use_rslora") is True:
            alpha *= math.sqrt(rank)  # rsLoRA, arXiv 2312.03732: the scale is alpha / sqrt(rank)
        if factor.rank is None and isinstance(factor, Kronecker):
            # PEFT scales whole matrices as well, by its r.
            return replace(factor, w1=factor.w1.float() * (alpha / rank))
        return replace(factor, alpha=alpha)

    def _pattern(self, name: str, module: str, usual: float) -> float:
        """The number that one of PEFT's patterns has for a module."""
        patterns = self.peft.get(name)
        patterns = patterns if isinstance(patterns, Mapping) else {}
        return next((_number(value, usual) for key, value in patterns.items() if _matches(key, module)), usual)


def _matches(pattern: str, module: str) -> bool:
    """Whether a key of PEFT's patterns means a module: the end of its name, which may be a regular expression.

    Raises ValueError for one that could go on for hours.
    """
    if module == pattern or module.endswith(f".{pattern}"):
        return True
    try:
        return re.match(rf"(.*\.)?({_checked_pattern(pattern)})$", module) is not None
    except re.error:
        return False


@lru_cache(maxsize=1024)
def _checked_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error:
        raise
    except (OverflowError, RecursionError) as error:
        raise re.error(str(error)) from error
    try:
        return compile_pattern(pattern).pattern
    except ValueError as error:
        raise ValueError(
            f"Pattern of a LoRA is refused: got {shorten(pattern)} ({error}), expected names of layers or a plain "
            f"pattern of them. Save the LoRA with the names themselves."
        ) from error


def _number(value: object, default: float) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LARGEST
    return float(value) if fits else float(default)


def _stored_config(metadata: Mapping[str, str] | None) -> dict:
    """PEFT's configuration from a header, whose keys name the pipeline's part first, `transformer.lora_alpha`."""
    try:
        stored = parse_json((metadata or {}).get(HEADER_KEY, "{}"))
        own = {key: value for key, value in stored.items() if not key.startswith(TEXT_ENCODER_PREFIXES)}
        return {key.partition(".")[2] or key: value for key, value in own.items()}
    except (ValueError, AttributeError):
        return {}  # a header is no more than a note: the tensors say the rest


def _group_keys(state_dict: Mapping[str, torch.Tensor]) -> tuple[dict, list[str], list[str]]:
    """({module's name: {role: (key, tensor)}}, unmatched keys, a text encoder's keys)."""
    groups: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    unmatched, text_encoder = [], []
    for key, tensor in state_dict.items():
        parsed = parse_key(key)
        if key.startswith(TEXT_ENCODER_PREFIXES):
            text_encoder.append(key)
        elif parsed is None or not _usable(parsed[1], tensor) or parsed[1] in groups.get(parsed[0], ()):
            unmatched.append(key)
        else:
            groups.setdefault(parsed[0], {})[parsed[1]] = key, tensor
    return groups, unmatched, text_encoder


def _usable(role: str, tensor: torch.Tensor) -> bool:
    if role == "alpha":
        return tensor.numel() == 1 and abs(float(tensor)) < _LARGEST
    return tensor.dtype.is_floating_point and tensor.ndim > 0 and tensor.numel() > 0


def _make_factors(target: Target, grouped: Mapping[str, tuple[str, torch.Tensor]]) -> dict[Target, Factor]:
    """The changes that a module's tensors make, of its weight and its bias; {} when they are incomplete."""
    tensors = {role: tensor for role, (_, tensor) in grouped.items()}
    made: dict[Target, Factor] = {}
    if "diff_b" in tensors:
        made[target.bias] = Difference(tensors["diff_b"])
    factor = _low_rank(tensors) or _hadamard(tensors) or _kronecker(tensors)
    if isinstance(factor, LowRank) and "up_bias" in tensors:
        made[target.bias] = Difference(tensors["up_bias"])
    if factor is not None:
        made[target] = _with_magnitude(replace(factor, alpha=_alpha(tensors)), tensors)
    elif "diff" in tensors:
        made[target] = Difference(tensors["diff"])
    return made


def _low_rank(tensors: Mapping[str, torch.Tensor]) -> LowRank | None:
    if "down" not in tensors or "up" not in tensors:
        return None
    return LowRank(tensors["down"], tensors["up"], tensors.get("mid"))


def _hadamard(tensors: Mapping[str, torch.Tensor]) -> Hadamard | None:
    given = _parts(tensors, "hada_")
    return Hadamard(**given) if {"w1_a", "w1_b", "w2_a", "w2_b"} <= given.keys() else None


def _kronecker(tensors: Mapping[str, torch.Tensor]) -> Kronecker | None:
    given = _parts(tensors, "lokr_")
    complete = all(side in given or {f"{side}_a", f"{side}_b"} <= given.keys() for side in ("w1", "w2"))
    return Kronecker(**given) if complete else None


def _parts(tensors: Mapping[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    return {role.removeprefix(start): tensor for role, tensor in tensors.items() if role.startswith(start)}


def _alpha(tensors: Mapping[str, torch.Tensor]) -> float | None:
    return float(tensors["alpha"]) if "alpha" in tensors else None


def _with_magnitude(factor: Factor, tensors: Mapping[str, torch.Tensor]) -> Factor:
    """PEFT's magnitudes are of rows, in any shape; LyCORIS' are of rows or columns, as their shape shows."""
    rows = (factor.product_shape or (0,))[0]
    if "magnitude" in tensors:
        return replace(factor, magnitude=tensors["magnitude"].reshape(-1, 1))
    if "dora_scale" in tensors:
        scale = tensors["dora_scale"]
        return replace(factor, magnitude=scale.reshape((-1, 1) if scale.shape[0] == rows else (1, -1)))
    return factor


def _roles_of(factor: Factor, tensors: Mapping) -> set[str]:
    """The roles of a module's tensors that went into one of its factors."""
    if isinstance(factor, Difference):
        return {role for role in ("diff", "diff_b", "up_bias") if role in tensors and tensors[role][1] is factor.values}
    start = {Hadamard: "hada_", Kronecker: "lokr_"}.get(type(factor), "")
    own = {f"{start}{part.name}" for part in fields(factor)} | {"alpha", "magnitude", "dora_scale"}
    return own & set(tensors)


def _require_match(lora: LoRA, state_dict: Mapping) -> None:
    if lora.factors:
        return
    if lora.text_encoder and not lora.unmatched:
        raise ValueError(
            f"LoRA of a text encoder alone: got {_some(lora.text_encoder)}, expected keys of a PixArt transformer. "
            f"Load it onto the CLIP with ComfyUI's own LoRA loader."
        )
    raise ValueError(
        f"No key of this LoRA is a PixArt's: got {len(state_dict)} keys such as {_some(lora.unmatched) or 'none'}, "
        f"expected names like 'transformer_blocks.0.attn1.to_q.lora_A.weight'. Choose a LoRA that was trained on "
        f"PixArt-alpha or PixArt-Sigma."
    )


def _check_factors(lora: LoRA, shapes: Mapping[str, tuple[int, ...]] | None, settings: _Settings) -> None:
    for target, factor in lora.factors.items():
        product = factor.product_shape
        wanted = None if shapes is None else target.shape(shapes[target.name])
        if product is None or wanted is not None and not factor.fits(wanted):
            got = "factors that do not belong together" if product is None else f"a change of shape {product}"
            raise ValueError(
                f"LoRA width mismatch at {shorten(target.name)}: got {got}, expected {wanted or 'one matrix'}. Choose "
                f"a LoRA that was trained on this PixArt model."
            )
        if not factor.is_finite:
            raise ValueError(
                f"Broken LoRA at {shorten(target.name)}: got infinite values or no numbers, expected finite ones. Its "
                f"training went wrong: choose an earlier checkpoint of it."
            )
    start = settings.peft.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_BASE_CHANGING):
        raise ValueError(
            f"LoRA of a changed base: got init_lora_weights {shorten(start)} in {PEFT_CONFIG}, expected an adapter for "
            f"the model as it is. Save it with PEFT's path_initial_model_for_weight_conversion."
        )
    if settings.use_dora and not any(factor.magnitude is not None for factor in lora.factors.values()):
        raise ValueError(
            f"DoRA without its magnitudes: got use_dora in {PEFT_CONFIG} and no 'lora_magnitude_vector', expected one "
            f"for each weight. Choose the complete file."
        )


def _some(names: tuple[str, ...], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"'{name}'" for name in names[:limit]) + more
