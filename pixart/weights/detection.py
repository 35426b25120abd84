"""Finds the configuration of PixArt weights by their shapes and by every other sign at hand, strongest first."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch

from ..config import (
    ALPHA,
    ALPHA_CAPTION_LENGTH,
    ALPHA_VAE_SCALE,
    CONFIGS,
    LATENT_DOWNSCALE,
    SIGMA,
    SIGMA_CAPTION_LENGTH,
    SIGMA_VAE_SCALE,
    PixArtConfig,
    read_name,
)
from ..files.documents import parse_json
from ..quoting import list_names, shorten
from .checking import check_declared
from .layouts import (
    CONFIG_KEY,
    DIFFUSERS,
    EXTRA_KEYS,
    NULL_CAPTION_KEY,
    RECOMPUTED_KEYS,
    Weights,
    merge_plan,
)
from .wrappers import identify_pixart

FAMILIES = (ALPHA, SIGMA)
CAPTION_LENGTH = {ALPHA: ALPHA_CAPTION_LENGTH, SIGMA: SIGMA_CAPTION_LENGTH}
VAE_SCALE = {ALPHA: ALPHA_VAE_SCALE, SIGMA: SIGMA_VAE_SCALE}
# Signs, in the words that a user reads. What no sign decides begins with GUESS.
GUESS = "guess"
CHOSEN, SAVED, CONFIG_JSON, VAE = "chosen by you", "saved configuration", "config.json", "autoencoder next to it"
_LARGEST = 1e9  # no number of a configuration comes near it; NaN is not below it either
_BLOCK_NAME = re.compile(r"blocks\.([0-9]{1,4})\.(.+)")


@dataclass(frozen=True)
class Detection:
    """What was found out about a checkpoint, and by which sign.

    layout: see `layouts.detect_layout`. family: "alpha" or "sigma".
    variant: the row of CONFIGS with the same family and trained size, or None for a size that was never released.
    signs: config field, or "family", -> the sign that decided it, in words.
    conflicts: signs that said otherwise and were overruled, in words.
    """

    config: PixArtConfig
    layout: str
    family: str
    variant: str | None
    signs: dict[str, str]
    conflicts: tuple[str, ...] = ()

    @property
    def guesses(self) -> tuple[str, ...]:
        """What no sign decides and could be otherwise, in words for whoever chooses the variant."""
        taken = {"family": f"PixArt-{self.family}", "base_size": f"{self.config.base_px} px"}
        taken["num_heads"] = f"{self.config.num_heads} heads"
        return tuple(
            f"{text}, {self.signs[field].partition(': ')[2]}"
            for field, text in taken.items()
            if self.signs[field].startswith(GUESS)
        )


@dataclass(frozen=True)
class _Evidence:
    """Everything that can be known about a checkpoint. row: the chosen row of CONFIGS; saved: see `saved_fields`."""

    shapes: dict[str, tuple[int, ...]]
    facts: dict
    row: PixArtConfig | None
    saved: dict
    model_config: Mapping | None
    vae_config: Mapping | None
    pipeline: str
    name: str


def detect_config(state_dict: Mapping, **hints) -> PixArtConfig:
    """The configuration of the model that these weights belong to; `explain_detection` with the reasons left out."""
    return explain_detection(state_dict, **hints).config


def explain_detection(state_dict: Mapping, *, metadata: Mapping[str, str] | None = None, **hints) -> Detection:
    """`detect` for weights in any layout, wrapped or not. metadata: texts that were kept with them."""
    return detect(identify_pixart(state_dict, metadata=metadata), **hints)


def detect(
    weights: Weights,
    *,
    variant: str | None = None,
    model_config: Mapping | None = None,
    vae_config: Mapping | None = None,
    pipeline: str = "",
    name: str = "",
    **overrides,
) -> Detection:
    """Find the configuration of PixArt weights, as `identify_pixart` gives them.

    What the weights' shapes say is taken from them. For the rest the first sign in this order decides: `overrides`
    (fields of PixArtConfig) and `variant` (a row of CONFIGS); the configuration saved by this package (in the
    weights' metadata, or as a tensor); rows of the learned null caption (120 or 300); micro-conditioning;
    `vae_config` (the config.json of the autoencoder next to it); `pipeline` (the class that model_index.json names);
    `model_config` (diffusers' config.json) where it can be one family's alone; tokens of the stored position grid;
    `name` (of file or folder); what `model_config` makes likely; and a default. The order differs where a sign is
    direct: the trained size and scale are taken from `model_config` before the position grid.
    Raises ValueError when the weights lack what every PixArt has, or are not those that `model_config` declares.
    """
    if variant is not None and variant not in CONFIGS:
        raise ValueError(
            f"Unknown variant: got {shorten(variant)}, expected one of {', '.join(CONFIGS)}. Choose one of them."
        )
    saved = saved_fields(weights)
    shapes = _original_shapes(weights)
    facts = _fields_from_shapes(shapes)
    row = CONFIGS[variant] if variant is not None else None
    check_declared(facts, model_config)
    evidence = _Evidence(shapes, facts, row, saved, model_config, vae_config, pipeline, name)
    family, family_sign, conflicts = _choose_family(evidence)
    found = {field: (value, "shapes of the weights") for field, value in facts.items()}
    found["base_size"] = _choose_base_size(evidence, family)
    found["pe_scale"] = _choose_pe_scale(evidence, family, found["base_size"][0])
    found["num_heads"] = _choose_heads(evidence)
    found["vae_scale"] = _choose_vae_scale(evidence, family)
    found["caption_length"] = _choose_caption_length(evidence, family)
    _apply_overrides(found, overrides)
    config = PixArtConfig(**{field: value for field, (value, _) in found.items()})
    signs = {"family": family_sign, **{field: sign for field, (_, sign) in found.items()}}
    released = f"{family}-{config.base_px}"
    return Detection(config, weights.layout, family, released if released in CONFIGS else None, signs, conflicts)


def config_to_tensor(config: PixArtConfig) -> torch.Tensor:
    """The configuration as a uint8 tensor to save under CONFIG_KEY, where a writer keeps tensors but no metadata."""
    return torch.tensor(list(json.dumps(asdict(config)).encode()), dtype=torch.uint8)


def saved_fields(weights: Weights) -> dict:
    """The configuration that this package saved with the weights. Empty when there is none."""
    tensor = weights.tensors.get(CONFIG_KEY)
    text = weights.metadata.get(CONFIG_KEY)
    if text is None and isinstance(tensor, torch.Tensor) and tensor.dtype == torch.uint8:
        text = bytes(tensor.flatten().tolist())
    if text is None:
        return {}
    defaults = {field.name: field.default for field in fields(PixArtConfig)}
    try:
        saved = {name: _checked(value, defaults[name]) for name, value in parse_json(text).items() if name in defaults}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Unreadable saved configuration: got {shorten(text)}, expected the JSON of a PixArt configuration. Save "
            f"the model again, or choose the original file."
        ) from error
    return saved


def _checked(value, default):
    """`value` as read from JSON when it has the kind of `default` and is usable; raises ValueError otherwise."""
    if isinstance(default, bool):
        fits = isinstance(value, bool)
    elif isinstance(default, tuple):
        fits = isinstance(value, list) and all(type(item) is int for item in value)
    else:
        kinds = (int,) if isinstance(default, int) else (int, float)
        fits = type(value) in kinds and 0 < value < _LARGEST
    if not fits:
        raise ValueError(f"got {shorten(value)}, expected a value like {default!r}")
    return tuple(value) if isinstance(default, tuple) else value


def _original_shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Original name -> shape, whatever the layout; nothing is merged for it."""
    tensors = weights.tensors
    if weights.layout != DIFFUSERS:
        return {name: tuple(value.shape) for name, value in tensors.items() if name != CONFIG_KEY}
    shapes = {name: tuple(tensors[name].shape) for name in RECOMPUTED_KEYS if name in tensors}
    for name, parts in merge_plan(name for name in tensors if name not in EXTRA_KEYS).items():
        found = [tuple(tensors[part].shape) for part in parts]
        shapes[name] = (sum(shape[0] for shape in found if shape), *found[0][1:])
    return shapes


def _shape(shapes: Mapping, name: str, dimensions: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None:
        raise ValueError(
            f"Weights are missing: got no {shorten(name)}, expected it in every PixArt model. Download the complete "
            f"checkpoint."
        )
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(
            f"Wrong shape of {shorten(name)}: got {shape}, expected {dimensions} dimensions. Download the checkpoint "
            f"again."
        )
    return shape


def _fields_from_shapes(shapes: Mapping) -> dict:
    """The fields of PixArtConfig that the tensors' shapes settle."""
    hidden, in_channels, patch_size, _ = _shape(shapes, "x_embedder.proj.weight", 4)
    blocks = [match for match in map(_BLOCK_NAME.fullmatch, shapes) if match]
    indices = {int(match[1]) for match in blocks}
    if indices != set(range(len(indices))) or not indices:
        raise ValueError(
            f"Blocks are missing: got {len(indices)} of them up to number {max(indices, default=0)}, "
            f"expected every one from 0 on. Download the complete checkpoint."
        )
    outputs = _shape(shapes, "final_layer.linear.weight", 2)[0] / patch_size**2
    if outputs not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"Wrong shape of 'final_layer.linear.weight': got {outputs:g} output channels, expected {in_channels} or "
            f"{2 * in_channels}. Choose a PixArt checkpoint."
        )
    ratios = {int(match[1]): _shape(shapes, match[0], 4)[-1] for match in blocks if match[2] == "attn.sr.weight"}
    if len(set(ratios.values())) > 1:
        raise ValueError(
            f"Key and value compression differs between blocks: got ratios {sorted(set(ratios.values()))}, "
            f"expected one. Choose a released checkpoint."
        )
    return {
        "depth": len(indices),
        "hidden_size": hidden,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "mlp_ratio": mlp_ratio(_shape(shapes, "blocks.0.mlp.fc1.weight", 2)[0], hidden),
        "caption_channels": _shape(shapes, "y_embedder.y_proj.fc1.weight", 2)[1],
        "learn_sigma": outputs == 2 * in_channels,
        "micro_condition": any(name.startswith(("csize_embedder.", "ar_embedder.")) for name in shapes),
        "qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
        "kv_compress_ratio": next(iter(ratios.values()), 1),
        "kv_compress_layers": tuple(sorted(ratios)),
    }


def mlp_ratio(inner: int, hidden: int) -> float:
    """The ratio whose product with `hidden`, cut to an integer, is `inner` again."""
    ratio = inner / hidden
    return ratio if int(hidden * ratio) == inner else math.nextafter(ratio, math.inf)


def _choose_family(evidence: _Evidence) -> tuple[str, str, tuple[str, ...]]:
    """(ALPHA or SIGMA, the sign that decided, the signs overruled): see `explain_detection` for the order."""
    votes = []
    if evidence.row is not None:
        votes.append((SIGMA if evidence.row.is_sigma else ALPHA, CHOSEN))
    if "vae_scale" in evidence.saved:
        saved_sigma = abs(evidence.saved["vae_scale"] - SIGMA_VAE_SCALE) < 1e-4
        votes.append((SIGMA if saved_sigma else ALPHA, SAVED))
    rows = _null_rows(evidence.shapes)
    votes += [
        (family, f"learned null caption of {rows} tokens") for family in FAMILIES if rows == CAPTION_LENGTH[family]
    ]
    if evidence.facts["micro_condition"]:
        votes.append((ALPHA, "micro-conditioning weights"))
    scale = _vae_scale(evidence.vae_config)
    votes += [(family, VAE) for family in FAMILIES if abs(scale - VAE_SCALE[family]) < 1e-4]
    votes += [(family, "model_index.json") for family in FAMILIES if f"pixart{family}" in evidence.pipeline.lower()]
    votes += [(family, CONFIG_JSON) for family in _family_of_model_config(evidence.model_config)]
    if _stored_tokens(evidence.shapes) == 128**2:
        votes.append((SIGMA, "stored position grid of 2048 px"))
    named = read_name(evidence.name)[0]
    if named:
        votes.append((named, "file name"))
    if not votes:
        votes = [(_likely_family(evidence), f"{GUESS}: the most common model of this kind")]
    family, sign = votes[0]
    return family, sign, tuple(f"{other_sign} says {other}" for other, other_sign in votes if other != family)


def _family_of_model_config(model_config: Mapping | None) -> list[str]:
    """Sizes and scales that one family alone has. Where a field is null, diffusers' own default is meant."""
    if model_config is None:
        return []
    size, scale = _number(model_config, "sample_size"), _number(model_config, "interpolation_scale")
    extra = model_config.get("use_additional_conditions")
    if size == 32 and scale in (1, None) or extra is True:
        return [ALPHA]
    return [SIGMA] if size == 256 or scale in (0.5, 4.0) or size == 128 and extra is False else []


def _likely_family(evidence: _Evidence) -> str:
    """Without any sign a small model is far likelier alpha's, and one of unknown size Sigma's 1024.

    Sigma's 512 px files in diffusers' layout spell out what is null in alpha's, which other programs may do as well.
    """
    config = evidence.model_config or {}
    if config.get("use_additional_conditions") is False and _number(config, "interpolation_scale") == 1:
        return SIGMA
    is_small = _stored_tokens(evidence.shapes) in (16**2, 32**2) or _number(config, "sample_size") in (32, 64)
    return ALPHA if is_small else SIGMA


def _vae_scale(vae_config: Mapping | None) -> float:
    """The latent scale of the autoencoder beside the model, 0 without one."""
    scale = _number(vae_config, "scaling_factor")
    if scale is None and vae_config is not None and vae_config.get("_class_name") == "AutoencoderKL":
        return ALPHA_VAE_SCALE  # diffusers' default, which early files left out
    return scale or 0.0


def _choose_base_size(evidence: _Evidence, family: str) -> tuple[int, str]:
    """(tokens per side at the trained size, the sign that decided)."""
    tokens_per_px = 1 / (LATENT_DOWNSCALE * evidence.facts["patch_size"])
    if evidence.row is not None:
        return evidence.row.base_size, CHOSEN
    if "base_size" in evidence.saved:
        return evidence.saved["base_size"], SAVED
    sample_size = _number(evidence.model_config, "sample_size")
    if sample_size and sample_size >= evidence.facts["patch_size"]:
        return int(sample_size * LATENT_DOWNSCALE * tokens_per_px), CONFIG_JSON
    tokens = _stored_tokens(evidence.shapes)
    if tokens:
        return math.isqrt(tokens), "stored position grid"
    base_px = read_name(evidence.name)[1]
    if base_px:
        return max(int(base_px * tokens_per_px), 1), "file name"
    sign = f"{GUESS}: the most common size of this family"
    if evidence.facts["micro_condition"]:
        sign = "micro-conditioning weights"
    base_px = 1024 if family == SIGMA or evidence.facts["micro_condition"] else 512
    return max(int(base_px * tokens_per_px), 1), sign


def _choose_pe_scale(evidence: _Evidence, family: str, base_size: int) -> tuple[float, str]:
    """(divisor of the position grid, the sign that decided); base_size: tokens per side at the trained size."""
    if evidence.row is not None:
        return evidence.row.pe_scale, CHOSEN
    if "pe_scale" in evidence.saved:
        return float(evidence.saved["pe_scale"]), SAVED
    scale = _number(evidence.model_config, "interpolation_scale")
    if scale and scale > 0:
        return float(scale), CONFIG_JSON
    sample_size = _number(evidence.model_config, "sample_size")
    if sample_size:
        return float(max(sample_size // 64, 1)), CONFIG_JSON  # diffusers' own rule where the scale is null
    base_px = base_size * evidence.facts["patch_size"] * LATENT_DOWNSCALE
    released = CONFIGS.get(f"{family}-{base_px}")
    if released is not None:
        return released.pe_scale, "trained size"
    return (base_px / 512 if family == SIGMA else max(base_px / 512, 1.0)), "trained size"


def _choose_heads(evidence: _Evidence) -> tuple[int, str]:
    """(heads, the sign that decided). Shapes do not tell; without another sign the width of a head is guessed.

    The guess: 72 as in XL/2 where it divides hidden_size, else 64 as in the smaller DiT models, else the largest
    divisor below 64.
    """
    if "num_heads" in evidence.saved:
        return evidence.saved["num_heads"], SAVED
    heads = _number(evidence.model_config, "num_attention_heads")
    if heads and heads >= 1:
        return int(heads), CONFIG_JSON
    heads = guess_heads(evidence.facts["hidden_size"])
    sign = "as released" if evidence.facts["hidden_size"] == PixArtConfig.hidden_size else GUESS
    return heads, f"{sign}: heads of width {evidence.facts['hidden_size'] // heads}"


def guess_heads(hidden_size: int) -> int:
    """A likely number of heads: see `_choose_heads`."""
    return hidden_size // next(width for width in (72, *range(64, 0, -1)) if hidden_size % width == 0)


def _choose_vae_scale(evidence: _Evidence, family: str) -> tuple[float, str]:
    """(factor between the autoencoder's latent and the model's, the sign that decided)."""
    if evidence.row is not None:
        return evidence.row.vae_scale, CHOSEN
    if "vae_scale" in evidence.saved:
        return evidence.saved["vae_scale"], SAVED
    scale = _vae_scale(evidence.vae_config)
    if scale > 0:
        return float(scale), VAE
    return VAE_SCALE[family], "family"


def _choose_caption_length(evidence: _Evidence, family: str) -> tuple[int, str]:
    """(caption tokens, the sign that decided)."""
    if evidence.row is not None:
        return evidence.row.caption_length, CHOSEN
    rows = _null_rows(evidence.shapes)
    if rows:
        return rows, "learned null caption"
    if "caption_length" in evidence.saved:
        return evidence.saved["caption_length"], SAVED
    return CAPTION_LENGTH[family], "family"


def _apply_overrides(found: dict, overrides: dict) -> None:
    unknown = set(overrides) - set(found)
    if unknown:
        raise ValueError(
            f"Unknown settings: got {list_names(sorted(unknown))}, expected fields of PixArtConfig. Correct "
            f"their names."
        )
    found.update({field: (value, CHOSEN) for field, value in overrides.items() if value is not None})


def _null_rows(shapes: Mapping) -> int:
    """Tokens of the learned null caption, 0 without one."""
    shape = shapes.get(NULL_CAPTION_KEY, ())
    return shape[0] if len(shape) == 2 else 0


def _stored_tokens(shapes: Mapping) -> int:
    """Tokens of the position grid in the file when it is a square one, else 0."""
    for name in RECOMPUTED_KEYS:
        shape = shapes.get(name, ())
        if len(shape) == 3 and math.isqrt(shape[1]) ** 2 == shape[1]:
            return shape[1]
    return 0


def _number(values: Mapping | None, key: str) -> float | None:
    value = values.get(key) if isinstance(values, Mapping) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < _LARGEST else None
