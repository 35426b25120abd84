"""The forms in which programs keep quantised weights: one table, read by all that loads weights.

A form is known by the name of a part beside each weight. What no form uses is refused by name, never cast.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...quoting import list_names, shorten
from . import formulas
from .layers import Layer, read_description
from .packed import Packed


@dataclass(frozen=True)
class Form:
    """title: its name for people. sign: fits the name of a part that only it has; `stem` is the layer. formula: the
    layer's stored parts -> its weight, float32, or in blocks where the layer allows that.
    """

    title: str
    sign: re.Pattern
    formula: Callable[[Layer], torch.Tensor | Packed]


def _form(title: str, ending: str, formula: Callable[[Layer], torch.Tensor | Packed]) -> Form:
    return Form(title, re.compile(rf"(?P<stem>.+)\.{ending}"), formula)


# The first that fits a layer reads it.
FORMS = (
    _form("bitsandbytes 8 bit", r"(?P<kind>SCB)", formulas.by_rows_of_127),
    _form("bitsandbytes 4 bit", r"weight\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)", formulas.by_code_table),
    _form("compressed-tensors, packed", r"(?P<kind>weight_packed)", formulas.by_packed_integers),
    _form("fine-grained fp8", r"(?P<kind>weight_scale_inv)", formulas.by_inverse_scale),
    _form("ComfyUI scaled fp8", r"(?P<kind>scale_weight)", formulas.by_scale),
    _form("optimum-quanto", r"weight\.(?P<kind>_scale)", formulas.by_quanto),
    _form("torchao", r"(?P<kind>_weight_qdata)", formulas.by_torchao),
    _form("compressed-tensors, modelopt or ComfyUI", r"(?P<kind>weight_scale)", formulas.by_scale),
)
# Parts that show a form which is not read -> its name.
UNREAD = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_scale_2": "NVFP4",
    ".W_q": "HQQ",
    ".weight_scales": "EETQ",
    ".weight_scale_second": "NVFP4",
    ".weight_global_scale": "NVFP4",
}
COMFY_MARK, COMFY_FILE_MARK, COMFY_METADATA = ".comfy_quant", "scaled_fp8", "_quantization_metadata"
_COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")  # whose weight is a scale times what is stored
# The ends of names under which weights lie, the longest first: some forms keep theirs elsewhere.
_WEIGHT_ENDINGS = (".weight._data._data", ".weight._data", ".weight_packed", "._weight_qdata", ".weight")
WEIGHT_ENDINGS = rf"(?:{'|'.join(map(re.escape, _WEIGHT_ENDINGS))})"
_COMPANION = re.compile(r"scale|absmax|quant|zero_?point|qzeros|g_idx|packed|amax|SCB|qdata|_shift|codebook|_lut")


def plain_name(name: str) -> str:
    """The name that a weight has once it is expanded; others as they are."""
    ending = next((ending for ending in _WEIGHT_ENDINGS if name.endswith(ending)), None)
    return name if ending is None else f"{name.removesuffix(ending)}.weight"


def is_quantised(tensors: Mapping) -> bool:
    """Whether anything in these weights is stored other than as plain numbers. Values need a shape alone."""
    return any(
        _COMPANION.search(name.rpartition(".")[2]) and not name.endswith("_table") or ".quant_state." in name
        for name in tensors
    ) or any(getattr(value, "dtype", None) in (torch.int8, torch.uint8) for value in tensors.values())


def expand(
    tensors: Mapping[str, torch.Tensor],
    file: str,
    *,
    settings: Mapping | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    shape_finder: Callable[[str, int], tuple[int, ...] | None] | None = None,
    keep_comfy: bool = False,
    keep_packed: bool = False,
) -> dict[str, torch.Tensor | Packed]:
    """The weights with every quantised one as plain numbers, under its layer's name; all others as they are.

    file: its name, for errors. settings: the quantization_config of config.json. dtype: of the expanded weights; None
    takes that of the weights which are not quantised. shape_finder: see `Layer`. keep_comfy: leaves layers that
    ComfyUI itself reads as they are. keep_packed: leaves 8 and 4 bit weights in blocks where their form has them, if
    no layer is left to ComfyUI.
    Raises ValueError naming file, format and layer for forms that are not known, and parts that do not fit together.
    """
    settings, metadata = settings or {}, metadata or {}
    _refuse_unread(tensors, file)
    _refuse_comfy_formats(tensors, metadata, file, keep_comfy)
    dtype = dtype or _plain_dtype(tensors)
    kept = {name.removesuffix(COMFY_MARK) for name in tensors if keep_comfy and name.endswith(COMFY_MARK)}
    keep_packed = keep_packed and not kept
    expanded, used = {}, {COMFY_FILE_MARK}
    for form in FORMS:
        for name in tensors:
            match = form.sign.fullmatch(name) if name not in used else None
            if match is None or match["stem"] in kept:
                continue
            told = (match["kind"], settings, metadata, shape_finder, keep_packed)
            layer = Layer(tensors, match["stem"], form.title, file, *told)
            weight = form.formula(layer)
            expanded[f"{layer.stem}.weight"] = weight if isinstance(weight, Packed) else weight.to(dtype)
            used |= layer.taken
    result = {name: tensor for name, tensor in tensors.items() if name not in used}
    _refuse_strays(result, kept, file)
    return {**result, **expanded}


def _plain_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The narrowest floating type of the matrices that are stored as they are; of all where there is none."""
    found = [tensor for name, tensor in tensors.items() if name.endswith(".weight")]
    for least in (2, 0):
        dtypes = {each.dtype for each in found if each.ndim >= least and each.is_floating_point()}
        wide = sorted((dtype for dtype in dtypes if dtype.itemsize > 1), key=lambda dtype: (dtype.itemsize, str(dtype)))
        if wide:
            return wide[0]
    return torch.float32


def _refuse_unread(tensors: Mapping, file: str) -> None:
    for name in tensors:
        title = next((title for ending, title in UNREAD.items() if name.endswith(ending)), None)
        if title:
            raise _unknown(title, name, file)


def _refuse_comfy_formats(tensors: Mapping, metadata: Mapping[str, str], file: str, keep_comfy: bool) -> None:
    if keep_comfy:
        return
    described = {name: tensor for name, tensor in tensors.items() if name.endswith(COMFY_MARK)}
    said = [(name, read_description(tensor)) for name, tensor in described.items()]
    if COMFY_METADATA in metadata:
        content = read_description(metadata[COMFY_METADATA]) or {}
        layers = content.get("layers", {})
        said += layers.items() if isinstance(layers, dict) else [(COMFY_METADATA, None)]
    for name, content in said:
        kind = content.get("format") if isinstance(content, dict) else None
        if kind not in _COMFY_FORMATS or "convrot" in str(content):
            raise _unknown(f"ComfyUI {shorten(kind)}", name, file)


def _refuse_strays(tensors: Mapping[str, torch.Tensor], kept: set[str], file: str) -> None:
    """Raises ValueError for integers where weights should be, and for scales that no form has used."""
    for name in tensors:
        stem = _stem_of(name, tensors)
        if stem is not None and stem not in kept:
            raise _unknown("an unknown quantisation", name, file)
    for name, tensor in tensors.items():
        if name.endswith(".weight") and not tensor.is_floating_point() and name.removesuffix(".weight") not in kept:
            raise ValueError(
                f"Integer weights without a scale: got {tensor.dtype} for {shorten(name)} in {shorten(file)} (a cast "
                f"that lost what the numbers mean), expected floating weights or a known quantisation. Choose the "
                f"same model in fp16, bf16 or fp8."
            )


def _stem_of(name: str, tensors: Mapping) -> str | None:
    """The layer that a scale or the like belongs to; None for what is none."""
    stem, _, last = name.rpartition(".")
    while stem:
        if f"{stem}.weight" in tensors or stem.endswith(".weight"):
            return stem.removesuffix(".weight") if _COMPANION.search(last) else None
        stem, _, rest = stem.rpartition(".")
        last = f"{rest}.{last}"
        if last.count(".") > 2:
            break
    return None


def _unknown(title: str, name: str, file: str) -> ValueError:
    read = list_names(dict.fromkeys(form.title for form in FORMS), 12)
    return ValueError(
        f"Unknown quantised weights: got {shorten(name)} in {shorten(file)} ({title}), expected fp32, fp16, bf16, fp8, "
        f"GGUF, or one of {read}. Choose the same model in one of these."
    )
