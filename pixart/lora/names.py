"""Which rows of which weight a key of a LoRA file means, and the names that LoRA files are written under."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..weights.layouts import BLOCK_NAMES, GLOBAL_NAMES

# Prefix -> whose files carry it, in words. Longer ones come before those that they begin with.
PREFIXES = {
    "unet.base_model.model.": "PEFT in a diffusers file",
    "base_model.model.": "PEFT",
    "lora_unet_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
    "transformer.": "diffusers",
    "model.diffusion_model.": "ComfyUI",
    "diffusion_model.": "ComfyUI",
    "unet.": "diffusers",
    "model.": "plain",
    "module.": "plain",
    "_orig_mod.": "plain",
}
PLAIN = "plain"
TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder", "te_", "te1_", "t5xxl.", "base_model.model.encoder.block.")
_LOHA = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
_LOKR = ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")
# What stands behind a module's name -> the tensor's role in the change.
ROLES = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down", "lora_linear_layer.down"), "down"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up", "lora_linear_layer.up"), "up"),
    "lora_mid": "mid",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    **{f"hada_{part}": f"hada_{part}" for part in _LOHA},
    **{f"lokr_{part}": f"lokr_{part}" for part in _LOKR},
    "diff": "diff",
    "diff_b": "diff_b",
    # PEFT's other kinds
    "lora_E": "values",
    **{name: name for name in ("ia3_l", "oft_R", "boft_R", "boft_s", "hra_u", "vera_lambda_b", "vera_lambda_d")},
    "fourierft_spectrum": "fourierft_spectrum",
    # LyCORIS' other kinds
    **{name: name for name in ("oft_blocks", "rescale", "w_norm", "b_norm", "on_input", "a1", "a2", "b1", "b2")},
    **{name: name for name in ("q_layer", "p_layer", "lambda_layer")},
}
WHOLE, WHOLE_BIAS, BARE_WEIGHT = "whole", "whole_bias", "bare_weight"
# Behind the role PEFT may put an adapter's name; a weight's own scale is none.
_KEY = re.compile(
    rf"(.+?)[._]({'|'.join(map(re.escape, sorted(ROLES, key=len, reverse=True)))})"
    r"(?:\.(?!bias$|weight[^.]|scale_|[^.]+_scale$)[^.]+)?(?:\.weight|(\.bias))?"
)
# Whole parameters beside PEFT's adapters, and LyCORIS' IA3, whose numbers are called as a weight.
_PEFT_MODULE = r"((?:(?:unet|transformer)\.)?base_model\.model\..+?)"
_INNER_MODULE = r"(?:\.base_layer|\.(?:modules_to_save|ln_tuning_layers)(?:\.(?!weight$|bias$)[^.]+)?)?"
_WHOLE_KEY = re.compile(rf"{_PEFT_MODULE}{_INNER_MODULE}(?:\.(?:weight|(bias)))?")
_BARE_KEY = re.compile(r"(lycoris_.+)\.weight")
_BLOCK = re.compile(r"((?:transformer_)?blocks)_(\d{1,4})_(.+)")
_LAST_PART = re.compile(r"(.*)\.(?:weight|bias)")


class Target(NamedTuple):
    """A share of one parameter's rows. name: the parameter in the original layout, `blocks.0.attn.qkv.weight`.

    part, parts: the share, counted from 0, and how many equal ones there are; q, k, v are 0, 1, 2 of 3.
    """

    name: str
    part: int = 0
    parts: int = 1

    @classmethod
    def of(cls, module: str) -> "Target":
        """The whole weight of a module by its original name, `blocks.0.attn.qkv`; a bare table is its own weight."""
        return cls(module if module.endswith(("_table", "y_embedding")) else f"{module}.weight")

    @property
    def module(self) -> str:
        """The parameter's name without `.weight` or `.bias`."""
        match = _LAST_PART.fullmatch(self.name)
        return match[1] if match else self.name

    @property
    def bias(self) -> "Target":
        """The same rows of the module's bias."""
        return self._replace(name=f"{self.module}.bias")

    def rows(self, count: int) -> slice:
        """The share of `count` rows."""
        size = count // self.parts
        return slice(self.part * size, (self.part + 1) * size)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the share of a parameter of `shape`."""
        return (shape[0] // self.parts, *shape[1:])

    def split(self) -> "list[Target]":
        """The shares in which the diffusers layout holds these rows; the target itself when it is one of them."""
        parts = len(_diffusers_names(self.name))
        return [self] if self.parts == parts else [self._replace(part=part, parts=parts) for part in range(parts)]

    @property
    def diffusers_module(self) -> str:
        """The module's name in the diffusers layout, of a target that `split` leaves as it is."""
        return Target(_diffusers_names(self.name)[self.part]).module


def parse_key(key: str) -> tuple[str, str] | None:
    """A LoRA file's key -> (module's name with its prefix, its role); None for other keys.

    A role is one of ROLES' values, "up_bias", WHOLE or WHOLE_BIAS for whole parameters, or BARE_WEIGHT.
    """
    match = _KEY.fullmatch(key)
    if match is not None and not (match[3] and ROLES[match[2]] != "up"):
        role = "up_bias" if match[3] else ROLES[match[2]]
        # PEFT's AdaLoRA has bare factors, its LoRA layers with weights: one without singular values is no LoRA.
        is_bare = match[2] in ("lora_A", "lora_B") and "base_model.model." in key and not key.endswith("weight")
        return match[1], f"adaptive_{role}" if is_bare and not match[3] else role
    if match := _BARE_KEY.fullmatch(key):
        return match[1], BARE_WEIGHT
    match = _WHOLE_KEY.fullmatch(key)
    return match and (match[1], WHOLE_BIAS if match[2] else WHOLE)


def resolve_name(name: str) -> tuple[Target, str] | None:
    """A module's name in any LoRA layout -> (the weight's rows, the prefix taken off); None when it is no PixArt's."""
    found = _look_up(name)
    if found is not None:
        return found, ""
    for prefix in PREFIXES:
        found = resolve_name(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if found is not None:
            return found[0], prefix + found[1]
    return None


def describe_prefix(prefix: str) -> str:
    """Whose files carry a prefix, in words."""
    return next((words for known, words in PREFIXES.items() if prefix.startswith(known)), PLAIN)


def _diffusers_names(name: str) -> tuple[str, ...]:
    index, _, rest = name.removeprefix("blocks.").partition(".")
    if name.startswith("blocks."):
        return tuple(f"transformer_blocks.{index}.{part}" for part in BLOCK_NAMES[rest])
    return GLOBAL_NAMES[name]


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _module_table(names: Mapping[str, tuple[str, ...]], of_original: bool) -> dict[str, Target]:
    """Flattened module name -> Target, of one layout."""
    table = {}
    for name, parts in names.items():
        if name.endswith(".bias"):
            continue
        spelled: Iterable[str] = (name,) if of_original else parts
        for part, spelling in enumerate(spelled):
            table[_flat(Target(spelling).module)] = Target(name, part, 1 if of_original else len(parts))
    return table


_BLOCK_TABLES = {"blocks": _module_table(BLOCK_NAMES, True), "transformer_blocks": _module_table(BLOCK_NAMES, False)}
_BLOCK_TABLES["transformer_blocks"] |= {
    "attn1_to_out": Target("attn.proj.weight"),  # the first attention processors had no `.0`
    "attn2_to_out": Target("cross_attn.proj.weight"),
    "attn1_to_qkv": Target("attn.qkv.weight"),  # diffusers' fuse_qkv_projections
    "attn2_to_kv": Target("cross_attn.kv_linear.weight"),
}
_GLOBAL_TABLE = _module_table(GLOBAL_NAMES, False) | _module_table(GLOBAL_NAMES, True)


def _look_up(name: str) -> Target | None:
    flat = _flat(name)
    match = _BLOCK.fullmatch(flat)
    if match is None:
        return _GLOBAL_TABLE.get(flat)
    found = _BLOCK_TABLES[match[1]].get(match[3].replace("processor_", ""))
    return None if found is None else found._replace(name=f"blocks.{int(match[2])}.{found.name}")
