"""Key layouts of PixArt weights: recognise one, unwrap it, and map between the original's and diffusers' names.

Nothing here opens a file. Values may be anything with a shape, so a file can be examined before its tensors are read;
only a merge or a split of tensors touches them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..quoting import shorten

ORIGINAL, DIFFUSERS, CONTROLNET, CONTROL, LORA = "original", "diffusers", "controlnet", "control", "lora"
T5, UNKNOWN = "T5 text encoder", "unknown"

CONFIG_KEY = "pixart_config"  # metadata entry, or uint8 tensor of the same JSON where a file keeps no metadata of ours
NULL_CAPTION_KEY = "y_embedder.y_embedding"
RECOMPUTED_KEYS = ("pos_embed", "pos_embed.pos_embed")  # the position grid in either layout; depends on the picture
EXTRA_KEYS = (*RECOMPUTED_KEYS, CONFIG_KEY)  # lie beside the weights, and are none
EMA_WRAPPERS = ("state_dict_ema", "model_ema", "ema")
MODEL_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# Longest first, so that `model.` never cuts a longer one in two.
PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.",
    "transformer.",
    "_orig_mod.",
    "module.",
    "model.",
)
# What else an all-in-one checkpoint carries next to `model.diffusion_model.`.
COMPANIONS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.", "model_ema.")


def _weights_and_biases(names: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {
        f"{name}.{part}": tuple(f"{target}.{part}" for target in targets)
        for name, targets in names.items()
        for part in ("weight", "bias")
    }


# Original name -> diffusers name, or names when diffusers cuts the tensor's rows into that many equal parts.
GLOBAL_NAMES = {
    **_weights_and_biases(
        {
            "x_embedder.proj": ("pos_embed.proj",),
            "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
            "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
            "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
            "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
            "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
            "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
            "t_block.1": ("adaln_single.linear",),
            "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
            "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
            "final_layer.linear": ("proj_out",),
        }
    ),
    "final_layer.scale_shift_table": ("scale_shift_table",),
    NULL_CAPTION_KEY: ("caption_projection.y_embedding",),  # in a few files; unknown to diffusers' own class
}
BLOCK_NAMES = {
    **_weights_and_biases(
        {
            "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
            "attn.proj": ("attn1.to_out.0",),
            "attn.q_norm": ("attn1.q_norm",),
            "attn.k_norm": ("attn1.k_norm",),
            "attn.sr": ("attn1.sr",),  # key and value compression; unknown to diffusers
            "attn.norm": ("attn1.norm",),
            "cross_attn.q_linear": ("attn2.to_q",),
            "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
            "cross_attn.proj": ("attn2.to_out.0",),
            "mlp.fc1": ("ff.net.0.proj",),
            "mlp.fc2": ("ff.net.2",),
        }
    ),
    "scale_shift_table": ("scale_shift_table",),
}
_GLOBAL_PARTS = {part: (name, parts) for name, parts in GLOBAL_NAMES.items() for part in parts}
_BLOCK_PARTS = {part: (name, parts) for name, parts in BLOCK_NAMES.items() for part in parts}
_ORIGINAL_BLOCK = re.compile(r"blocks\.(\d{1,4})\.(.+)")
_DIFFUSERS_BLOCK = re.compile(r"transformer_blocks\.(\d{1,4})\.(.+)")

_CONTROL_SIGN = re.compile(r"copied_block\.|(?:^|\.)controlnet_blocks\.\d+\.(?:transformer_block|after_proj)\.")

# Family -> a piece of a key that only its files have. The first match names the family, so the order matters.
_LORA_SIGNS = (".lora_A.", ".lora_B.", "lora_up.", "lora_down.", ".lora.", ".hada_w1_", ".lokr_w1", ".dora_scale")
_FAMILY_SIGNS = {
    T5: ("SelfAttention.q.weight", "encoder.block.0.layer.0."),
    "CLIP text encoder": ("text_model.encoder.layers.0.", "transformer.resblocks.0."),
    "HED edge detector": ("block1.convs.0.weight",),
    "ControlNet (of another model)": (
        "input_hint_block.",
        "controlnet_cond_embedding.",
        "controlnet_x_embedder.",
        "controlnet_blocks.",
        "controlnet_down_blocks.",
        "pos_embed_input.proj.",
    ),
    "UNet (Stable Diffusion)": ("input_blocks.0.0.weight", "down_blocks.0.resnets.0.time_emb_proj.weight"),
    "VAE": ("decoder.conv_in.weight", "decoder.conv_out.weight", "quant_conv.weight"),
    "Flux": ("double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.0."),
    "Stable Diffusion 3": ("joint_blocks.0.", "context_embedder.weight"),
    "Hunyuan-DiT": ("mlp_t5.0.weight", "blocks.0.default_modulation."),
    "AuraFlow": ("double_layers.0.",),
    "Lumina": ("cap_embedder.0.weight",),
    "Sana": ("blocks.0.mlp.inverted_conv.", "transformer_blocks.0.ff.conv_inverted."),
    "LTX-Video": ("patchify_proj.weight",),
    "DiT": ("y_embedder.embedding_table.weight",),
}


@dataclass(frozen=True)
class Weights:
    """Weights out of their wrappers, and what they are: found once by `identify`, then handed on.

    tensors: plain name -> a tensor, or anything with a shape that stands for one in a file. layout: see
    `detect_layout`. metadata: texts that were kept with them.
    """

    tensors: dict
    layout: str
    metadata: Mapping[str, str] = field(default_factory=dict)


def detect_layout(state_dict: Mapping) -> str:
    """Tell what kind of weights these are, wrapped or not, by their names alone.

    Returns ORIGINAL, DIFFUSERS, CONTROLNET (base and control in one file), CONTROL (control blocks alone), LORA,
    the name of another family ("Flux", "T5 text encoder", ...), or UNKNOWN.
    """
    return identify(state_dict).layout


def unwrap(state_dict: Mapping, weights: str = "ema") -> dict:
    """The weights of a training checkpoint alone: the tensors that `identify` finds, under their plain names."""
    return identify(state_dict, weights).tensors


def identify(content: object, weights: str = "ema", metadata: Mapping[str, str] | None = None) -> Weights:
    """Take the weights out of all that a file or dict holds (wrappers and prefixes off, what is no tensor left out),
    and tell what they are.

    weights: "ema" prefers the averaged weights where there are both, "model" the trained ones. The learned null
    caption always comes from the trained ones: averaging skips buffers, so the averaged one is an untrained tensor.
    A ControlNet file keeps its `base_model.` and `controlnet.` prefixes; `control_layouts.part_controlnet` parts them.
    Raises ValueError when there is nothing like a state dict, or not the chosen weights.
    """
    if weights not in ("ema", "model"):
        raise ValueError(
            f"Unknown choice of weights: got {shorten(weights)}, expected 'ema' or 'model'. Choose one of them."
        )
    chosen = _strip_prefixes(_pick_weights(content, weights))
    if weights == "ema" and _wrapped(content, EMA_WRAPPERS) and _wrapped(content, MODEL_WRAPPERS):
        trained = _strip_prefixes(_pick_weights(content, "model"))
        for key in (NULL_CAPTION_KEY, f"base_model.{NULL_CAPTION_KEY}"):
            if key in trained:
                chosen[key] = trained[key]
    tensors = {key: value for key, value in chosen.items() if hasattr(value, "shape")}
    return Weights(tensors, _layout_of(tensors), metadata or {})


def identify_pixart(content: object, weights: str = "ema", metadata: Mapping[str, str] | None = None) -> Weights:
    """As `identify`, of a PixArt model: ORIGINAL or DIFFUSERS. Raises ValueError saying what the weights are else."""
    found = identify(content, weights, metadata)
    if found.layout not in (ORIGINAL, DIFFUSERS):
        raise ValueError(
            f"Not a PixArt model: got {describe(found.layout)}, expected PixArt weights. {advice(found.layout)}"
        )
    return found


def to_original(state_dict: Mapping) -> dict:
    """Rename to the original layout, merging q, k, v; wrapped, prefixed and original dicts are taken as well.

    The position grid is left out, since it is recomputed. A missing `y_embedder.y_embedding` stays missing.
    Raises ValueError naming every unknown key and every missing part of a merged tensor.
    Source: diffusers, convert_pixart_alpha_to_diffusers.py, read backwards.
    """
    return original_tensors(identify_pixart(state_dict))


def original_tensors(weights: Weights) -> dict:
    """As `to_original`, of weights that are identified; they are emptied on the way, so that a merge never holds both
    copies of the whole model.
    """
    found = weights.tensors
    names = [name for name in found if name not in EXTRA_KEYS]
    plan = merge_plan(names) if weights.layout == DIFFUSERS else {name: (name,) for name in names}
    if weights.layout == ORIGINAL:
        _diffusers_names(names)  # unknown names raise here as well
    converted = {}
    for name, parts in plan.items():
        tensors = [found.pop(part) for part in parts]
        converted[name] = tensors[0] if len(tensors) == 1 else _concatenate(name, tensors)
    return converted


def to_diffusers(state_dict: Mapping, *, keep_null_caption: bool = False) -> dict:
    """Rename to the diffusers layout, cutting qkv and kv by rows (views of the same memory).

    keep_null_caption: also carries the learned null caption, as `caption_projection.y_embedding`. With it
    `to_original` gives back everything; without it the names are exactly those of diffusers' own class.
    Raises ValueError naming every unknown key and every tensor whose rows cannot be cut.
    Source: diffusers, convert_pixart_alpha_to_diffusers.py.
    """
    weights = identify_pixart(state_dict)
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in EXTRA_KEYS}
    if weights.layout == DIFFUSERS:
        merge_plan(tensors)  # unknown names raise here as well
        converted = tensors
    else:
        converted = {}
        for name, parts in _diffusers_names(tensors).items():
            converted.update(zip(parts, _cut_rows(name, tensors[name], len(parts)), strict=True))
    if not keep_null_caption:
        converted.pop(GLOBAL_NAMES[NULL_CAPTION_KEY][0], None)
    return converted


def merge_plan(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Original name -> the diffusers names whose rows make it up, for all of `names` (diffusers layout).

    Raises ValueError naming every unknown key and every missing part.
    """
    names, plan, unknown = dict.fromkeys(names), {}, []
    for name in names:
        match = _DIFFUSERS_BLOCK.fullmatch(name)
        found = _BLOCK_PARTS.get(match[2]) if match else _GLOBAL_PARTS.get(name)
        if found is None:
            unknown.append(name)
        elif match:
            plan[f"blocks.{match[1]}.{found[0]}"] = tuple(f"transformer_blocks.{match[1]}.{part}" for part in found[1])
        else:
            plan[found[0]] = found[1]
    _refuse_unknown(unknown)
    missing = [part for parts in plan.values() for part in parts if part not in names]
    if missing:
        raise ValueError(
            f"Weights are missing: got no {_some(missing)}, expected every part of a merged tensor. "
            f"Download the complete file."
        )
    return plan


def parts_to_merge(names: Iterable[str]) -> set[str]:
    """Those of these (unwrapped) names that are parts of a tensor which the original layout holds in one."""
    matches = (match for match in map(_DIFFUSERS_BLOCK.fullmatch, names) if match)
    return {match[0] for match in matches if match[2] in _BLOCK_PARTS and len(_BLOCK_PARTS[match[2]][1]) > 1}


def describe(layout: str) -> str:
    """A layout in words, for a message."""
    names = {
        ORIGINAL: "a PixArt model",
        DIFFUSERS: "a PixArt model in diffusers layout",
        CONTROLNET: "a PixArt ControlNet with its base model",
        CONTROL: "PixArt ControlNet weights without a base model",
        LORA: "a LoRA",
        UNKNOWN: "weights of an unknown kind",
    }
    return names.get(layout, f"{layout} weights")


def advice(layout: str) -> str:
    """What to do in the editor with a file of this layout."""
    texts = {
        ORIGINAL: "Load it with Load PixArt Checkpoint.",
        DIFFUSERS: "Load it with Load PixArt Checkpoint.",
        CONTROLNET: "Load it with Load PixArt ControlNet, which gives its model too.",
        CONTROL: "Load it with Load PixArt ControlNet.",
        LORA: "Load the base model here and the LoRA with Load PixArt LoRA.",
        UNKNOWN: "Choose a PixArt-alpha or PixArt-Sigma checkpoint.",
        T5: "Load it with Load T5 Text Encoder.",
        "VAE": "Load it with Load VAE.",
    }
    return texts.get(layout, "Choose a PixArt checkpoint, or load this file with ComfyUI's own nodes.")


def _layout_of(keys: Iterable[str]) -> str:
    keys = [key for key in keys if isinstance(key, str)]
    if any(sign in key for key in keys for sign in _LORA_SIGNS):
        return LORA
    if any(map(_CONTROL_SIGN.search, keys)):
        return CONTROLNET if any(key.startswith(("base_model.", "transformer.")) for key in keys) else CONTROL
    for family, signs in _FAMILY_SIGNS.items():
        if any(sign in key for key in keys for sign in signs):
            return family
    if any(_is_named(key, _DIFFUSERS_BLOCK, _BLOCK_PARTS) for key in keys) or "adaln_single.linear.weight" in keys:
        return DIFFUSERS
    if any(_is_named(key, _ORIGINAL_BLOCK, BLOCK_NAMES) for key in keys) or "t_block.1.weight" in keys:
        return ORIGINAL
    return UNKNOWN


def _is_named(key: str, pattern: re.Pattern, names: Mapping) -> bool:
    match = pattern.fullmatch(key)
    return bool(match) and match[2] in names


def _wrapped(state_dict: Mapping, wrappers: tuple[str, ...]) -> dict | None:
    return next((state_dict[name] for name in wrappers if isinstance(state_dict.get(name), Mapping)), None)


def _pick_weights(state_dict: Mapping, weights: str) -> dict:
    """Follow the wrappers of training checkpoints down to the dict of weights."""
    for _ in range(4):  # deeper nesting is no checkpoint
        if not isinstance(state_dict, Mapping):
            break
        averaged, trained = _wrapped(state_dict, EMA_WRAPPERS), _wrapped(state_dict, MODEL_WRAPPERS)
        if averaged is None and trained is None:
            break
        if weights == "model" and trained is None:
            raise ValueError(
                "No trained weights in this checkpoint: got averaged (EMA) weights only, expected 'state_dict'. "
                "Choose the EMA weights."
            )
        state_dict = averaged if averaged is not None and (weights == "ema" or trained is None) else trained
    if not isinstance(state_dict, Mapping) or not any(hasattr(value, "shape") for value in state_dict.values()):
        kind = type(state_dict).__name__
        raise ValueError(
            f"No weights in this file: got {'no tensors' if isinstance(state_dict, Mapping) else f'a {kind} object'}, "
            f"expected a dict of tensors. Choose a checkpoint that was saved as a state dict."
        )
    return {key: value for key, value in state_dict.items() if isinstance(key, str)}


def _strip_prefixes(weights: dict) -> dict:
    """Take off what wrappers and hosts put before every name; a ControlNet's own prefixes stay."""
    inner = PREFIXES[0]
    if any(key.startswith(inner) for key in weights):
        weights = {key: value for key, value in weights.items() if not key.startswith(COMPANIONS)}
    while weights:
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in weights)), None)
        if prefix is None:
            break
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _diffusers_names(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Original name -> its diffusers names. Raises ValueError naming every unknown key."""
    plan, unknown = {}, []
    for name in names:
        match = _ORIGINAL_BLOCK.fullmatch(name)
        parts = BLOCK_NAMES.get(match[2]) if match else GLOBAL_NAMES.get(name)
        if parts is None:
            unknown.append(name)
        else:
            plan[name] = tuple(f"transformer_blocks.{match[1]}.{part}" for part in parts) if match else parts
    _refuse_unknown(unknown)
    return plan


def _refuse_unknown(unknown: list[str]) -> None:
    if unknown:
        raise ValueError(
            f"Unknown weights: got {_some(unknown)}, expected the names of a PixArt model. "
            f"Choose a PixArt-alpha or PixArt-Sigma checkpoint."
        )


def _concatenate(name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    try:
        return torch.cat(tensors)
    except (RuntimeError, TypeError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(
            f"Parts of {name} do not fit together: got shapes {shapes}, expected equal ones. Download the file again."
        ) from error


def _cut_rows(name: str, tensor: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    if count == 1:
        return (tensor,)
    if tensor.ndim == 0 or not tensor.shape[0] or tensor.shape[0] % count:
        raise ValueError(
            f"Wrong shape of {name}: got {tuple(tensor.shape)}, expected rows in {count} equal parts. "
            f"Download the file again."
        )
    return tensor.split(tensor.shape[0] // count)


def _some(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"'{name}'" for name in names[:limit]) + more
