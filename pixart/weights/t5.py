"""T5 v1.1 encoders: tell their files from others, and read the size of one from the shapes of its weights.

Building the network is left to ComfyUI or transformers.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..quoting import list_names
from .folders import TEXT_ENCODER_STEMS, read_json
from .layouts import describe
from .quantised.forms import COMFY_MARK, expand, is_quantised
from .quantised.packed import expand_all
from .quantised.subclasses import refuse_subclasses
from .reading import naming, open_weights, quantisation_settings, top_level
from .wrappers import detect_layout

_MARKER_LAYER = "encoder.block.0.layer.0.SelfAttention.q."
MARKER = f"{_MARKER_LAYER}weight"
CONFIG_FIELDS = ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size")

_WEIGHTS_OR_INDEX = re.compile(rf"(?:{'|'.join(TEXT_ENCODER_STEMS)})[.-](?:.*\.)?(?:safetensors|bin)(?:\.index\..*)?")
_RELATIVE_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_RELATIVE_BUCKETS = 32
# What single files carry beside an encoder, and no encoder reads.
_HARMLESS = {"logit_scale", "spiece_model", "scaled_fp8", "text_projection.weight"}
# Tensor of every layer -> what its number of rows is. Columns are packed in some quantised formats.
_LAYER_ROWS = {
    "layer.0.SelfAttention.q.weight": "inner",
    "layer.0.SelfAttention.k.weight": "inner",
    "layer.0.SelfAttention.v.weight": "inner",
    "layer.0.SelfAttention.o.weight": "d_model",
    "layer.0.layer_norm.weight": "d_model",
    "layer.1.DenseReluDense.wi_0.weight": "d_ff",
    "layer.1.DenseReluDense.wi_1.weight": "d_ff",
    "layer.1.DenseReluDense.wo.weight": "d_model",
    "layer.1.layer_norm.weight": "d_model",
}


_ENCODER_NAME = re.compile(
    rf"shared\.weight|encoder\.final_layer_norm\.weight|encoder\.block\.\d{{1,3}}\."
    rf"(?:{'|'.join(map(re.escape, _LAYER_ROWS))}|layer\.0\.SelfAttention\.relative_attention_bias\.weight"
    rf"|layer\.1\.DenseReluDense\.wi\.weight)"
)


def is_t5_folder(folder: Path) -> bool:
    """True for a folder with weights under a text encoder's usual names and no other model's config.json."""
    names = [entry.name for entry in folder.iterdir()]
    if not any(map(_WEIGHTS_OR_INDEX.fullmatch, names)):
        return False
    try:
        config = read_json(folder / "config.json") if "config.json" in names else {}
    except ValueError:
        return False
    return config.get("model_type", "t5") == "t5"


def encoder_weights(state_dict: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The encoder's part of a T5 state dict, under its Hugging Face names: shared.weight and encoder.*.

    Any prefix is cut; the decoder is dropped; other keys (quantisation scales) stay.
    Raises ValueError naming the file when there is no T5 encoder in it.
    """
    places = [place for key in state_dict for place, sign, _ in [key.rpartition(_MARKER_LAYER)] if sign]
    if not places:
        raise ValueError(
            f"Wrong text encoder file: got {_describe(state_dict)} in {name}, expected a T5 v1.1 encoder. "
            f"Choose a T5-XXL file, such as t5xxl_fp16.safetensors, or a text_encoder folder."
        )
    prefix = places[0]
    weights = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    embedding = weights.pop("encoder.embed_tokens.weight", None)
    if embedding is not None:
        weights.setdefault("shared.weight", embedding)
    return {key: value for key, value in weights.items() if not key.startswith(("decoder.", "lm_head."))}


def read_encoder(
    path: Path, dtype: torch.dtype | None = None, *, packed: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """(weights under their Hugging Face names, CONFIG_FIELDS) of a file or folder; quantised ones as plain numbers.

    dtype: of what was quantised; None takes that of the other weights, and fp16 for GGUF. packed: leaves GGUF's
    weights, and 8 and 4 bit ones whose form allows it, as `quantised.packed.Packed`.
    Raises FileNotFoundError for missing files, ValueError naming the file for everything else.
    """
    path = Path(path)
    state_dict, metadata = read_encoder_tensors(path)
    weights = plain_weights(encoder_weights(state_dict, path.name), path, metadata, dtype=dtype, keep_packed=packed)
    if not packed:
        weights = expand_all(weights, dtype or torch.float16)
    return weights, detect_t5_config(weights, path.name)


def read_encoder_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a text encoder's file or folder as they are stored. Raises as `read_encoder`."""
    with naming(path):
        opened = open_weights(path, TEXT_ENCODER_STEMS)
        refuse_subclasses(opened.content, path.name)
    return opened.read(top_level(opened)), opened.metadata


def plain_weights(
    weights: Mapping[str, torch.Tensor],
    path: Path,
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    keep_comfy: bool = False,
    keep_packed: bool = False,
) -> dict[str, torch.Tensor]:
    """`encoder_weights` with quantised ones as plain numbers, but for those that ComfyUI reads where keep_comfy is set,
    and those that have blocks where keep_packed is.

    Raises ValueError naming the file for quantised weights of an unknown form, and for tensors that nothing reads.
    """
    if is_quantised(weights):
        weights = expand(
            weights,
            path.name,
            settings=quantisation_settings(read_json(path / "config.json")) if _has_config(path) else None,
            metadata=metadata,
            dtype=dtype,
            shape_finder=_shapes_by_width(weights),
            keep_comfy=keep_comfy,
            keep_packed=keep_packed,
        )
    _refuse_unread(weights, path.name)
    return dict(weights)


def _has_config(path: Path) -> bool:
    return (path / "config.json").is_file()


def _shapes_by_width(weights: Mapping[str, torch.Tensor]):
    """A function (layer, number of weights) -> their shape, by the width that the last norm has."""
    norm = weights.get("encoder.final_layer_norm.weight")
    width = norm.numel() if norm is not None else 0

    def find(stem: str, count: int) -> tuple[int, ...] | None:
        if not width or count % width:
            return None
        return (width, count // width) if stem.endswith((".o", ".wo")) else (count // width, width)

    return find


def _refuse_unread(weights: Mapping[str, torch.Tensor], name: str) -> None:
    """Raises ValueError for tensors that are no part of an encoder, and of no layer that ComfyUI reads itself."""
    kept = tuple(key.removesuffix(COMFY_MARK[1:]) for key in weights if key.endswith(COMFY_MARK))
    strange = [
        key
        for key in weights
        if key not in _HARMLESS and not _ENCODER_NAME.fullmatch(key) and not (kept and key.startswith(kept))
    ]
    if strange:
        raise ValueError(
            f"Tensors that nothing reads: got {list_names(strange[:3])}{' ...' * (len(strange) > 3)} in {name}, "
            f"expected a T5 v1.1 encoder alone. Choose a T5 in fp16, bf16 or fp8, or save the encoder alone."
        )


def _describe(state_dict: Mapping[str, torch.Tensor]) -> str:
    if not state_dict:
        return "no tensors"
    if any("decoder.block.0." in key for key in state_dict):
        return "a T5 decoder without its encoder"
    return describe(detect_layout(state_dict))


def detect_t5_config(weights: Mapping[str, torch.Tensor], name: str, declared: Mapping | None = None) -> dict[str, int]:
    """CONFIG_FIELDS of a T5 v1.1 encoder, read from the shapes of its weights (see encoder_weights).

    declared: a config.json or the metadata of a file; what it says must agree with the weights.
    Raises ValueError naming the file for missing tensors, other T5 families, and a config that does not agree.
    """
    if "encoder.block.0.layer.1.DenseReluDense.wi.weight" in weights:
        raise _wrong_family("T5 1.0 (wi in place of wi_0 and wi_1)", name)
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in weights:
        raise _wrong_family("UMT5 (a relative position table in every layer)", name)
    layers = [int(match[1]) for key in weights if (match := re.match(r"encoder\.block\.(\d{1,3})\.", key))]
    rows = _expected_rows(weights, 1 + max(layers))
    missing = [key for key in rows if key not in weights]
    if missing:
        raise ValueError(
            f"Incomplete text encoder: got {name} without {list_names(missing[:3])}{' ...' * (len(missing) > 3)}, "
            f"expected {len(rows)} tensors for {1 + max(layers)} layers. Download the file again."
        )
    width = rows["encoder.final_layer_norm.weight"]
    for key, count in rows.items():
        expected = (count, width) if key == "shared.weight" else (count,)
        if weights[key].shape[: len(expected)] != expected:
            raise ValueError(
                f"Wrong shape of {key}: got {tuple(weights[key].shape)} in {name}, expected to begin with {expected}. "
                f"Download the file again."
            )
    num_heads = weights[_RELATIVE_BIAS].shape[-1]
    config = {
        "d_model": width,
        "d_ff": rows["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"],
        "d_kv": rows[MARKER] // max(num_heads, 1),
        "num_heads": num_heads,
        "num_layers": 1 + max(layers),
        "vocab_size": rows["shared.weight"],
    }
    for field in CONFIG_FIELDS:
        if declared and declared.get(field, config[field]) != config[field]:
            raise ValueError(
                f"Text encoder and its config disagree: got {field} {declared[field]} for {name}, "
                f"expected {config[field]} from the weights. Choose files of one download."
            )
    return config


def _expected_rows(weights: Mapping[str, torch.Tensor], num_layers: int) -> dict[str, int]:
    """Every tensor of the encoder -> its number of rows, read from the first layer."""

    def count(key):
        return next(iter(weights[key].shape), 0) if key in weights else 0

    first = "encoder.block.0."
    sizes = {
        "inner": count(MARKER),
        "d_model": count(f"{first}layer.0.layer_norm.weight"),
        "d_ff": count(f"{first}layer.1.DenseReluDense.wi_0.weight"),
    }
    rows = {"shared.weight": count("shared.weight"), "encoder.final_layer_norm.weight": sizes["d_model"]}
    rows[_RELATIVE_BIAS] = _RELATIVE_BUCKETS
    for layer in range(num_layers):
        rows |= {f"encoder.block.{layer}.{key}": sizes[size] for key, size in _LAYER_ROWS.items()}
    return rows


def _wrong_family(got: str, name: str) -> ValueError:
    return ValueError(
        f"Wrong text encoder file: got {got} in {name}, expected a T5 v1.1 encoder. "
        f"Choose the T5-XXL that PixArt was trained with, such as t5xxl_fp16.safetensors."
    )
