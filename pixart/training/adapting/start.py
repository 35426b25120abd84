"""A LoRA file as the beginning of a training: its form in the settings, its weights in the adapters."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...data.identity import fingerprint
from ...lora import LoRA, LowRank, Target
from ...quoting import list_names, shorten
from ..adapters import AdaptedLinear
from ..settings import TrainingSettings

_IN_BLOCK = re.compile(r"blocks\.\d+\.(.+)")


def settings_of_start(lora: LoRA, settings: TrainingSettings) -> tuple[TrainingSettings, list[str]]:
    """(the settings with the rank, alpha, form and, where theirs leave some out, layers of a file; what differs).

    Raises ValueError for what is no LoRA or DoRA of layers, and for a training of something else than a LoRA.
    """
    if not settings.is_adapter:
        raise ValueError(
            f"Nothing to begin with: got the LoRA of start_from with kind {shorten(settings.kind)}, expected a kind "
            f"that trains a LoRA. Merge it into the model first, or train a LoRA."
        )
    if settings.adapter != "lora":
        raise ValueError(
            f"Nothing to begin with: got the LoRA of start_from with adapter {shorten(settings.adapter)}, expected "
            f"adapter 'lora'. Merge it into the model first, or train a LoRA."
        )
    factors = _require_plain(lora)
    rank = max(factor.rank for factor in factors.values())
    scale = Counter(factor.scale for factor in factors.values()).most_common(1)[0][0]
    lengths = {factor.magnitude is not None for factor in factors.values()}
    if len(lengths) > 1:
        raise ValueError(
            "DoRA and LoRA in one: got magnitudes for some layers, expected them for all or none. Train from another "
            "file."
        )
    own = {"rank": rank, "alpha": scale * rank, "rslora": False, "dora": lengths == {True}}
    modules = {target.module for target in factors}
    if not all(re.fullmatch(settings.pattern, module) for module in modules):
        own |= {"targets": "custom", "target_pattern": _pattern_of(modules)}
    changed = replace(settings, **own)
    told = [
        f"{name} {getattr(changed, name):g} of the file instead of {getattr(settings, name):g}"
        for name in ("rank", "dora", "rslora")
        if getattr(changed, name) != getattr(settings, name)
    ]
    if changed.adapter_alpha != settings.adapter_alpha:
        told.append(f"alpha {changed.adapter_alpha:g} of the file instead of {settings.adapter_alpha:g}")
    if changed.pattern != settings.pattern:
        told.append(f"layers of the file instead of {settings.targets}")
    return changed, [f"begins with a LoRA: {', '.join(told)}"] if told else []


def _require_plain(lora: LoRA) -> dict[Target, LowRank]:
    if not lora.factors or lora.shortfall:
        raise ValueError(
            f"LoRA to begin with does not fit: got {lora.shortfall or 'no layers'}, expected one whose every key is of "
            f"this model. Choose a LoRA that was trained on this PixArt model."
        )
    found = {}
    for target, factor in lora.factors.items():
        by_columns = factor.magnitude is not None and factor.magnitude.shape[0] == 1
        if type(factor) is not LowRank or by_columns or target.module == target.name or target.name.endswith(".bias"):
            raise ValueError(
                f"Not to be trained on: got {factor.title} of {shorten(target.name)}, expected a LoRA or DoRA by rows "
                f"of layers. Merge it into the model, and train a new LoRA on that."
            )
        found[target] = factor.without_mid()
    return found


def _pattern_of(modules: Iterable[str]) -> str:
    """A pattern of these layers: those of blocks in every block, any other by its name."""
    inner = sorted({re.escape(found[1]) for module in modules if (found := _IN_BLOCK.fullmatch(module))})
    others = sorted(re.escape(module) for module in modules if not _IN_BLOCK.fullmatch(module))
    return "|".join([*([rf"blocks\.\d+\.({'|'.join(inner)})"] if inner else []), *others])


@torch.no_grad()
def begin_with(model: nn.Module, lora: LoRA) -> list[str]:
    """Put a file's weights into the adapters of a model, made by `settings_of_start`; what the layers compute is exact.

    A smaller rank than the adapters' is filled up with rows that begin without effect, as layers do that are not in
    the file. Returns what to tell. Raises ValueError naming a layer that the model has not.
    """
    factors, without = _require_plain(lora), 0
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    by_module: dict[str, dict[Target, LowRank]] = {}
    for target, factor in factors.items():
        by_module.setdefault(target.module, {})[target] = factor
    strange = sorted(by_module.keys() - adapters.keys())
    if strange:
        raise ValueError(
            f"LoRA to begin with does not fit: got layers {list_names(strange, 3)}, expected those of this model. "
            f"Choose a LoRA that was trained on this PixArt model."
        )
    for name, adapter in adapters.items():
        if name in by_module:
            _fill(name, adapter, _shares(by_module[name], adapter.parts))
        else:
            without += 1
    return [f"{without} of {len(adapters)} layers are not in the LoRA to begin with, and begin anew"] if without else []


def _shares(given: Mapping[Target, LowRank], parts: int) -> dict[int, LowRank]:
    """The factors by the part of a packed layer; those of the whole layer are shared out by their rows."""
    shares = {}
    for target, factor in given.items():
        if target.parts == parts:
            shares[target.part] = factor
            continue
        rows = factor.up.shape[0] // parts
        for part in range(parts):
            own = slice(part * rows, (part + 1) * rows)
            lengths = None if factor.magnitude is None else factor.magnitude[own]
            shares[part] = replace(factor, up=factor.up[own], magnitude=lengths)
    return shares


def _fill(name: str, adapter: AdaptedLinear, shares: Mapping[int, LowRank]):
    downs, ups = adapter.lora_down.chunk(adapter.parts), adapter.lora_up.chunk(adapter.parts)
    for part, factor in shares.items():
        down, up, rank = downs[part], ups[part], factor.rank
        if factor.down.shape[1] != down.shape[1] or factor.up.shape[0] != up.shape[0]:
            raise ValueError(
                f"LoRA to begin with does not fit at {shorten(name)}: got {factor.up.shape[0]} rows and "
                f"{factor.down.shape[1]} columns, expected {up.shape[0]} and {down.shape[1]}. Choose a LoRA that was "
                f"trained on this PixArt model."
            )
        down[:rank] = factor.down.reshape(rank, *down.shape[1:])
        up[:, :rank] = (factor.up * (factor.scale / adapter.scale)).reshape(up.shape[0], rank, *up.shape[2:])
        if factor.magnitude is not None:
            adapter.dora_scale.chunk(adapter.parts)[part].copy_(factor.magnitude)


def identity_of(lora: LoRA) -> str:
    """What a continued training knows the file by."""
    named: dict[str, Tensor] = {}
    for target, factor in lora.factors.items():
        named |= {f"{target} {part} {factor.alpha}": tensor for part, tensor in factor.tensors.items()}
    return fingerprint(named.items())
