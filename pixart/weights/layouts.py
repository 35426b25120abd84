"""Key layouts of PixArt weights: recognise one, unwrap it, and map between the original's and diffusers' names.

Nothing here opens a file. Values may be anything with a shape, so a file can be examined before its tensors are read;
only a merge or a split of tensors touches them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from .quantised.forms import plain_name
from .quantised.packed import Packed, join_rows

ORIGINAL, DIFFUSERS, CONTROLNET, CONTROL, LORA = "original", "diffusers", "controlnet", "control", "lora"
T5, UNKNOWN = "T5 text encoder", "unknown"

CONFIG_KEY = "pixart_config"  # metadata entry, or uint8 tensor of the same JSON where a file keeps no metadata of ours
NULL_CAPTION_KEY = "y_embedder.y_embedding"
RECOMPUTED_KEYS = ("pos_embed", "pos_embed.pos_embed")  # the position grid in either layout; depends on the picture
EXTRA_KEYS = (*RECOMPUTED_KEYS, CONFIG_KEY)  # lie beside the weights, and are none


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
# What diffusers' fuse_qkv_projections() adds: the rows of the parts in one tensor, as the original has them.
_FUSED = {"attn1.to_q": "attn1.to_qkv", "attn2.to_k": "attn2.to_kv"}
_BLOCK_PARTS |= {
    f"{fused}.{kind}": _BLOCK_PARTS[f"{part}.{kind}"] for part, fused in _FUSED.items() for kind in ("weight", "bias")
}
_ORIGINAL_BLOCK = re.compile(r"blocks\.(\d{1,4})\.(.+)")
_DIFFUSERS_BLOCK = re.compile(r"transformer_blocks\.(\d{1,4})\.(.+)")

_CONTROL_SIGN = re.compile(r"copied_block\.|(?:^|\.)controlnet_blocks\.\d+\.(?:transformer_block|after_proj)\.")

# Family -> a piece of a key that only its files have. The first match names the family, so the order matters.
_LORA_SIGNS = (
    *(".lora_A.", ".lora_B.", "lora_up.", "lora_down.", ".lora.", ".hada_w1_", ".lokr_w1", ".dora_scale", ".lora_E"),
    *(".ia3_l", ".oft_R.", ".oft_blocks", ".boft_R", ".hra_u", ".vera_lambda_", ".fourierft_spectrum", ".lambda_layer"),
)
_FAMILY_SIGNS = {
    T5: ("SelfAttention.q.weight", "encoder.block.0.layer.0.", "enc.blk.0.attn_q."),
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
    """Weights out of their wrappers, and what they are: found once by `wrappers.identify`, then handed on.

    tensors: plain name -> a tensor, or anything with a shape that stands for one in a file. layout: see
    `layout_of`. metadata: texts that were kept with them. place: where they lay, "" for the top. others: the places
    of other such models in the file. left: what else lay there and is not used, in words.
    """

    tensors: dict
    layout: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    place: str = ""
    others: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def original_tensors(weights: Weights) -> dict:
    """Under the original's names, q, k and v merged, without the position grid. The weights are emptied on the way, so
    that a merge never holds both copies of the whole model.

    Raises ValueError naming every unknown key, every missing part of a merged tensor, and a tensor that is there fused
    and in parts which differ.
    """
    found = weights.tensors
    names = [name for name in found if name not in EXTRA_KEYS]
    if weights.layout == ORIGINAL:
        diffusers_names(names)  # unknown names raise here as well
    plan = merge_plan(names) if weights.layout == DIFFUSERS else {name: (name,) for name in names}
    converted = {}
    for name, parts in plan.items():
        fused = found.pop(_fused_name(parts), None)
        tensors = [found.pop(part) for part in parts if part in found]
        whole = tensors[0] if len(tensors) == 1 else _concatenate(name, tensors) if tensors else fused
        if fused is not None and not _equal(whole, fused):
            raise ValueError(
                f"Two versions of {name}: got a fused projection that differs from its parts, expected the same "
                f"numbers. Call unfuse_qkv_projections() on the model that is right, and save it again."
            )
        converted[name] = whole
    return converted


def diffusers_tensors(weights: Weights, *, keep_null_caption: bool = False) -> dict:
    """Under diffusers' names, qkv and kv cut by rows (views of the same memory). keep_null_caption: carry it as well.

    Raises ValueError naming every unknown key and every tensor whose rows cannot be cut.
    """
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in EXTRA_KEYS}
    if weights.layout == DIFFUSERS and not any(map(_is_fused, tensors)):
        merge_plan(tensors)  # unknown names raise here as well
        converted = tensors
    else:
        tensors = original_tensors(Weights(tensors, weights.layout))
        converted = {}
        for name, parts in diffusers_names(tensors).items():
            converted.update(zip(parts, _cut_rows(name, tensors[name], len(parts)), strict=True))
    if not keep_null_caption:
        converted.pop(GLOBAL_NAMES[NULL_CAPTION_KEY][0], None)
    return converted


def merge_plan(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Original name -> the diffusers names whose rows make it up, for all of `names` (diffusers layout).

    A fused projection is in the place of its parts, unless all of them are there too.
    Raises ValueError naming every unknown key and every missing part.
    """
    names, plan, unknown = dict.fromkeys(names), {}, []
    for name in names:
        match = _DIFFUSERS_BLOCK.fullmatch(name)
        found = _BLOCK_PARTS.get(match[2]) if match else _GLOBAL_PARTS.get(name)
        if found is None:
            unknown.append(name)
        elif match:
            parts = tuple(f"transformer_blocks.{match[1]}.{part}" for part in found[1])
            fused = _fused_name(parts)
            alone = fused in names and not any(part in names for part in parts)
            plan[f"blocks.{match[1]}.{found[0]}"] = (fused,) if alone else parts
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


def _fused_name(parts: tuple[str, ...]) -> str:
    """The name of the fused projection that holds these parts' rows, "" where there is none."""
    match = _DIFFUSERS_BLOCK.fullmatch(parts[0])
    stem, _, kind = match[2].rpartition(".") if match else ("", "", "")
    return f"transformer_blocks.{match[1]}.{_FUSED[stem]}.{kind}" if stem in _FUSED else ""


def _is_fused(name: str) -> bool:
    match = _DIFFUSERS_BLOCK.fullmatch(name)
    return bool(match) and match[2].rpartition(".")[0] in _FUSED.values()


def parts_to_merge(names: Iterable[str]) -> set[str]:
    """Those of these (unwrapped) names that are parts of a tensor which the original layout holds in one."""
    matches = (match for match in map(_DIFFUSERS_BLOCK.fullmatch, names) if match)
    return {
        match[0]
        for match in matches
        if match[2] in _BLOCK_PARTS and len(_BLOCK_PARTS[match[2]][1]) > 1 and not _is_fused(match[0])
    }


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


def layout_of(keys: Iterable[str]) -> str:
    """What plain names belong to: ORIGINAL, DIFFUSERS, CONTROLNET (base and control), CONTROL (control blocks alone),
    LORA, the name of another family ("Flux", "T5 text encoder", ...), or UNKNOWN.
    """
    keys = [plain_name(key) for key in keys if isinstance(key, str)]  # also of a quantised weight
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


def diffusers_names(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
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
        if any(isinstance(tensor, Packed) for tensor in tensors):
            return join_rows(tensors)
        return torch.cat(tensors)
    except (RuntimeError, TypeError, KeyError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(
            f"Parts of {name} do not fit together: got shapes {shapes}, expected equal ones. Download the file again."
        ) from error


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes, of whatever type."""
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8) if tensor.device.type != "meta" else tensor


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
