"""Adapters of kinds that PEFT alone knows: its own layers, made from the file, merge them into each weight."""

import copy
import dataclasses
import importlib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..quoting import list_names, shorten
from .alphas import PEFT_CONFIG, check_pattern
from .kinds import Factor
from .names import Target, resolve_name
from .relative import Relative

# Kinds that PEFT merges into any weight, from the file and its configuration alone.
MERGED = (
    *("BEFT", "C3A", "DEFT", "DELORA", "GLORA", "GRALORA", "HIRA", "MISS", "PEANUT", "PVERA", "RANDLORA"),
    *("ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
)
_OF_BIASES = ("BEFT", "GLORA", "ROAD")  # whose merges change biases as well, or alone
# Read here, or of no meaning for a merge.
_IGNORED = ("modules_to_save", "auto_mapping", "base_model_name_or_path", "revision", "task_type")
_PREFIX = "base_model.model."


_ORDER = ("x_embedder", "blocks", "final_layer", "t_embedder", "csize_embedder", "ar_embedder", "t_block", "y_embedder")
_BLOCK_ORDER = (
    *("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2"),
)
_MOST = 1024  # the largest number that a configuration may have where no tensor is as wide


@dataclass(frozen=True, eq=False)
class MergedByPeft(Relative):
    """A change that one of PEFT's layers makes. layer: with the adapter "default"; name: PEFT's of the kind.

    is_bias: whether it is that of the layer's bias. weight_target, base: the layer's weight, where it counts.
    """

    kind: ClassVar[str] = "PEFT"
    layer: torch.nn.Module
    name: str
    is_bias: bool = False
    weight_target: Target | None = None
    base: torch.Tensor | None = None

    @property
    def title(self):
        return self.name

    @property
    def is_finite(self):
        return all(bool(each.float().isfinite().all()) for each in self.layer.parameters())

    def to(self, *_):
        return self

    @property
    def needs(self):
        return self.weight_target if self.base is None else None

    def bound(self, weight):
        return replace(self, base=weight)

    def change(self, weight):
        layer = copy.deepcopy(self.layer)  # a merge writes into its layer
        parts = layer.get_base_layer()
        if self.base is not None:
            parts.weight.data = self.base.detach().to("cpu", torch.float32, copy=True)
        part = parts.bias if self.is_bias else parts.weight
        part.data = weight.detach().to("cpu", torch.float32, copy=True)
        with torch.no_grad():
            layer.merge()
        merged = layer.get_base_layer()
        changed = merged.bias if self.is_bias else merged.weight
        return changed.data.to(weight.device, weight.dtype) - weight

    def fits(self, shape):
        base = self.layer.get_base_layer()
        return tuple((base.bias if self.is_bias else base.weight).shape) == tuple(shape)


def is_for_peft(config: Mapping, keys: Iterable[str]) -> bool:
    """Whether a configuration is of a kind that PEFT itself has to merge; VeRA only where its projections are drawn."""
    kind = config.get("peft_type")
    return kind in MERGED and not (kind == "VERA" and any(key.endswith("base_model.vera_A") for key in keys))


def merge_with_peft(
    state_dict: Mapping[str, torch.Tensor], config: Mapping, shapes: Mapping[str, tuple[int, ...]] | None
) -> tuple[dict[Target, Factor], set[str]]:
    """(changes by PEFT's own layers, the keys that went into them). Layers without all of their tensors are left out.

    config: PEFT's adapter_config.json. shapes: of the model's parameters, in the original layout.
    Raises ValueError without the package or the model's shapes, or for a configuration or tensors that do not fit it.
    """
    kind = config["peft_type"]
    if shapes is None:
        raise ValueError(
            f"Adapter without its model: got {kind}, whose layers PEFT makes for a model, expected one. Put it onto "
            f"the model with Load PixArt LoRA."
        )
    # PEFT casts what it is given: numbers where none belong would be rounded without a word.
    state_dict = {
        key: tensor for key, tensor in state_dict.items() if tensor.is_floating_point() or key.endswith("indices")
    }
    model = _inject(_skeleton(shapes), config, state_dict)
    unused, incomplete = _load(model, state_dict, kind)
    # What all layers share is missing in each of them, and there once.
    shared = {key.removeprefix("base_model.").partition(".")[0] for key in state_dict if not key.startswith(_PREFIX)}
    factors, layers = {}, []
    for name, layer in model.base_model.model.named_modules():
        found = resolve_name(name) if hasattr(layer, "merged_adapters") else None
        own = [key.removeprefix(f"{_PREFIX}{name}.") for key in incomplete if key.startswith(f"{_PREFIX}{name}.")]
        if found is None or any(key.partition(".")[0] not in shared for key in own):
            continue
        target = found[0]
        layers.append(f"{_PREFIX}{name}.")
        if kind != "BEFT":
            factors[target] = MergedByPeft(layer, kind)
        if kind in _OF_BIASES:
            needs = target if kind == "GLORA" else None
            factors[target.bias] = MergedByPeft(layer, kind, is_bias=True, weight_target=needs)
    used = {key for key in state_dict if key not in unused}
    return factors, {key for key in used if not key.startswith(_PREFIX) or key.startswith(tuple(layers))}


def _inject(model: torch.nn.Module, config: Mapping, state_dict: Mapping[str, torch.Tensor]):
    """PEFT's model around `model`. Raises ValueError for a configuration that it does not take."""
    try:
        mapping = importlib.import_module("peft.mapping")
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ValueError(
            f"Adapter of a kind that PEFT merges: got {config['peft_type']}, expected the package peft for it. "
            f"Install it with: pip install peft"
        ) from error
    make = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(config["peft_type"])
    known = {each.name for each in dataclasses.fields(make)} if make else set()
    strange = [key for key, value in config.items() if key not in known and value not in (None, False)]
    if strange:
        raise ValueError(
            f"Adapter of another version of PEFT: got {config['peft_type']} with {list_names(strange)}, expected what "
            f"peft {peft.__version__} knows. Update the package: pip install --upgrade peft"
        )
    _check_sizes(config, state_dict)
    set_here = {"inference_mode": True, **dict.fromkeys(_IGNORED)}
    fields = {key: value for key, value in {**config, **set_here}.items() if key in known and key != "peft_type"}
    fields |= {"bias": "none"} if "bias" in known else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(model, make(**fields)).eval()
    except Exception as error:  # any of PEFT's checks of a stranger's configuration
        raise _misfit(config["peft_type"], error) from error


def _load(model, state_dict: Mapping[str, torch.Tensor], kind: str) -> tuple[set[str], set[str]]:
    """(keys that PEFT had no place for, parameters of its layers that it had no key for)."""
    load = importlib.import_module("peft.utils.save_and_load").set_peft_model_state_dict
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = load(model, {key: value.clone() for key, value in state_dict.items()})
    except Exception as error:  # what PEFT says of tensors that do not fit, in many types
        raise _misfit(kind, error) from error
    missing = {key for key in result.missing_keys if ".base_layer." not in key}
    unexpected = {re.sub(r"\.default(?=\.|$)", "", key) for key in result.unexpected_keys}
    return unexpected, missing


def _misfit(kind: str, error: Exception) -> ValueError:
    return ValueError(
        f"Adapter that PEFT does not take: got {kind} and {shorten(error)}, expected one for this PixArt model. "
        f"Choose an adapter that was trained on it, with the adapter_config.json that PEFT saved."
    )


def _check_sizes(config: Mapping, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError for numbers that no tensor of the file is as wide as, and patterns that take hours."""
    largest = max([_MOST, *(side for tensor in state_dict.values() for side in tensor.shape)])
    for name, value in config.items():
        numbers = value.values() if isinstance(value, Mapping) else [value]
        if (
            "seed" not in name
            and "key" not in name
            and any(isinstance(each, int | float) and not abs(each) <= largest for each in numbers)
        ):
            raise ValueError(
                f"Unusable number in {PEFT_CONFIG}: got {shorten(value)} for {shorten(name)}, expected at most "
                f"{largest}, which fits the tensors. Take the file as PEFT saved it."
            )
        texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Mapping) else []
        for text in texts:
            if name.endswith(("modules", "pattern")):
                check_pattern(text)


def _skeleton(shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
    """diffusers' names and order of layers, with weights of nought that take no memory."""
    root = torch.nn.Module()
    for name in sorted(shapes, key=_place):
        if not name.endswith(".weight") or len(shapes[name]) < 2:
            continue
        for share in Target(name).split():
            *path, last = share.diffusers_module.split(".")
            parent = root
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, _layer(share.shape(shapes[name])))
    return root


def _place(name: str) -> tuple[int, int, int]:
    """Where diffusers' class has a parameter: PEFT draws what it does not save layer by layer."""
    top, _, rest = name.partition(".")
    index, _, inner = rest.partition(".")
    if top != "blocks":
        return _ORDER.index(top), 0, 0
    inner = inner.rpartition(".")[0]
    return _ORDER.index(top), int(index), _BLOCK_ORDER.index(inner) if inner in _BLOCK_ORDER else len(_BLOCK_ORDER)


def _layer(shape: tuple[int, ...]) -> torch.nn.Module:
    if len(shape) == 2:
        layer = torch.nn.Linear(shape[1], shape[0], device="meta")
    else:
        layer = torch.nn.Conv2d(shape[1], shape[0], shape[2:], stride=shape[2:], device="meta")
    layer.weight = torch.nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
    layer.bias = torch.nn.Parameter(torch.zeros(shape[0]), requires_grad=False)
    return layer
