"""Writes LoRAs under the names that ComfyUI, PEFT and kohya's programs read."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..files.atomic import write_atomically, write_folder_atomically
from ..quoting import shorten
from .alphas import HEADER_KEY, PEFT_CONFIG
from .kinds import Difference, Factor, Hadamard, Kronecker, LowRank
from .names import Target
from .reading import PEFT_WEIGHTS, LoRA
from .relative import Relative, Rotated

HOST, PEFT, KOHYA = "host", "peft", "kohya"
LAYOUTS = (HOST, PEFT, KOHYA)


def save_lora(
    path: str | os.PathLike,
    factors: Mapping[Target | str, Factor],
    *,
    layout: str = HOST,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a LoRA: one `.safetensors` file, or with the layout "peft" a folder that PEFT loads.

    factors: rows of a weight, or the original name of a module, `blocks.0.attn.qkv` -> its change.
    metadata: texts for the file's header; PEFT's configuration of another file is left out.
    dtype: of the tensors; None keeps each.
    The file or folder appears complete or not at all; a file is replaced, a folder with content is not.
    Raises ValueError for what the layout cannot hold.
    """
    path = Path(path)
    tensors, adapter_config = export_lora(factors, layout)
    tensors = {name: _ready(name, tensor, dtype) for name, tensor in tensors.items()}
    texts = {str(key): str(value) for key, value in (metadata or {}).items() if key != HEADER_KEY} | {"format": "pt"}
    if adapter_config is None:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=texts))
        return
    # The header keeps the alphas with the tensors, should the file leave its folder.
    texts[HEADER_KEY] = json.dumps({f"transformer.{key}": value for key, value in adapter_config.items()})

    def fill(folder: Path) -> None:
        write_atomically(folder / PEFT_WEIGHTS[0], lambda temporary: save_file(tensors, temporary, metadata=texts))
        (folder / PEFT_CONFIG).write_text(json.dumps(adapter_config, indent=2) + "\n", encoding="utf-8")

    write_folder_atomically(path, fill)


def export_lora(
    factors: Mapping[Target | str, Factor], layout: str = HOST
) -> tuple[dict[str, torch.Tensor], dict | None]:
    """(tensors under the names of a layout, PEFT's adapter_config or None).

    "host": `diffusion_model.` and the original's names; rows of q, k, v alone as `transformer.` and diffusers' names,
    which ComfyUI puts into place. "peft": `base_model.model.` and diffusers' names, everything packed split up.
    "kohya": `lora_unet_` and the original's names, separate q, k, v packed into one of their ranks' sum.
    Every layout keeps the change exactly. Raises ValueError for what the layout cannot hold.
    """
    if layout not in LAYOUTS:
        raise ValueError(
            f"Unknown layout: got {shorten(layout)}, expected one of {', '.join(LAYOUTS)}. Choose one of them."
        )
    if not factors:
        raise ValueError("Nothing to save: got a LoRA without factors, expected at least one. Choose another LoRA.")
    placed = {Target.of(place) if isinstance(place, str) else place: factor for place, factor in factors.items()}
    if layout == PEFT:
        return _export_peft(placed)
    if layout == KOHYA:
        placed = _pack(placed)
    tensors: dict[str, torch.Tensor] = {}
    for target, factor in placed.items():
        name = target.module if target.parts == 1 else target.diffusers_module
        if layout == KOHYA:
            name = f"lora_unet_{name.replace('.', '_')}"
        else:
            name = f"{'diffusion_model' if target.parts == 1 else 'transformer'}.{name}"
        tensors |= _named_tensors(name, target, factor)
    return tensors, None


def export_notes(lora: LoRA, layout: str) -> list[str]:
    """What whoever uses the file should know, in words: what was not in it before, and who reads it otherwise."""
    notes = [f"converted in part: {lora.shortfall}"] if lora.shortfall else []
    notes += [f"assumed: {each}" for each in lora.assumed]
    if layout != PEFT and any(factor.magnitude is not None for factor in lora.factors.values()):
        notes.append(
            "ComfyUI's own loaders set the lengths of DoRA's rows by those before the change; load this file with Load "
            "PixArt LoRA."
        )
    return notes


def split_factor(target: Target, factor: Factor) -> dict[Target, Factor]:
    """The same change in the shares that the diffusers layout has: the same `down`, and rows of `up`.

    Raises ValueError for a kind of change that has no rows to share out.
    """
    shares = target.split()
    if shares == [target]:
        return {target: factor}
    by_columns = factor.magnitude is not None and factor.magnitude.shape[0] == 1
    if not isinstance(factor, LowRank) or by_columns:
        raise ValueError(
            f"Change of packed rows: got {factor.title} of {shorten(target.name)}, expected LoRA or DoRA by rows, "
            f"which can be split into q, k and v. Choose the layout 'host'."
        )
    parts = {}
    for share in shares:
        rows = share.rows(factor.up.shape[0])
        magnitude = None if factor.magnitude is None else factor.magnitude[rows]
        parts[share] = replace(factor, up=factor.up[rows], magnitude=magnitude)
    return parts


def _pack(factors: Mapping[Target, Factor]) -> dict[Target, Factor]:
    """Shares of one weight joined: `down`s on top of each other, `up`s as blocks of a diagonal, alphas within."""
    packed: dict[Target, Factor] = {}
    shares: dict[Target, dict[int, Factor]] = {}
    for target, factor in factors.items():
        if target.parts == 1:
            packed[target] = factor
        else:
            shares.setdefault(Target(target.name, 0, target.parts), {})[target.part] = factor
    for target, given in shares.items():
        whole = Target(target.name)
        if whole in packed or not all(isinstance(each, LowRank) and each.magnitude is None for each in given.values()):
            kinds = ", ".join(sorted({each.title for each in given.values()}))
            raise ValueError(
                f"Separate rows of {shorten(target.name)}: got {kinds}, expected plain LoRA, which can be joined. "
                f"Choose the layout 'host' or 'peft'."
            )
        packed[whole] = _join(given, target.parts)
    return packed


def _join(shares: Mapping[int, LowRank], parts: int) -> LowRank:
    shares = {part: shares[part].without_mid() for part in sorted(shares)}
    first = next(iter(shares.values()))
    rows, rank = first.up.shape[0], sum(share.down.shape[0] for share in shares.values())
    # A multiplication would round numbers of few bits: there is none where all scales are one.
    is_equal = all(share.scale == first.scale for share in shares.values())
    scale, dtype = (first.scale, first.up.dtype) if is_equal else (1.0, torch.float32)
    up = first.up.new_zeros(parts * rows, rank, dtype=dtype)
    column = 0
    for part, share in shares.items():
        width = share.down.shape[0]
        values = share.up.flatten(1)
        place = slice(part * rows, (part + 1) * rows), slice(column, column + width)
        up[place] = values if is_equal else values.to(dtype) * share.scale
        column += width
    return LowRank(torch.cat([share.down for share in shares.values()]), up, alpha=scale * rank)


def _named_tensors(name: str, target: Target, factor: Factor) -> dict[str, torch.Tensor]:
    """A change under the names that kohya's and LyCORIS' programs gave its tensors."""
    if isinstance(factor, Difference):
        return {f"{name}.{'diff_b' if target == target.bias else 'diff'}": factor.values}
    if isinstance(factor, Rotated) and factor.halves is not None and factor.lengths is None:
        return {f"{name}.oft_blocks": factor.halves, f"{name}.alpha": torch.tensor(0.0)}  # without a bound
    if isinstance(factor, Relative):
        raise ValueError(
            f"Change that depends on its weight: got {factor.title} of {shorten(target.name)}, expected a LoRA, LoHa, "
            f"LoKr or difference. Load it with Load PixArt LoRA, or save the changed model and extract a LoRA from it."
        )
    alpha = factor.scale * factor.rank if factor.rank else factor.alpha
    tensors = {} if alpha is None else {f"{name}.alpha": torch.tensor(float(alpha))}
    names = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}
    start = {Hadamard: "hada_", Kronecker: "lokr_"}.get(type(factor), "")
    for part, tensor in factor.tensors.items():
        if part != "magnitude":
            tensors[f"{name}.{names.get(part, f'{start}{part}')}"] = tensor
    if factor.magnitude is not None:
        dimensions = max(tensor.ndim for tensor in factor.tensors.values())
        tensors[f"{name}.dora_scale"] = factor.magnitude.reshape(*factor.magnitude.shape, *[1] * (dimensions - 2))
    return tensors


def _export_peft(factors: Mapping[Target, Factor]) -> tuple[dict[str, torch.Tensor], dict]:
    tensors, ranks, alphas = {}, {}, {}
    with_magnitude = set()
    for target, factor in factors.items():
        _require_peft(target, factor)
        for share, part in split_factor(target, factor).items():
            part, module = part.without_mid(), share.diffusers_module
            name = f"base_model.model.{module}"
            tensors[f"{name}.lora_A.weight"] = part.down
            tensors[f"{name}.lora_B.weight"] = part.up
            if part.magnitude is not None:
                shape = (-1,) if part.down.ndim == 2 else (1, -1, 1, 1)
                tensors[f"{name}.lora_magnitude_vector"] = part.magnitude.reshape(shape)
            with_magnitude.add(part.magnitude is not None)
            ranks[module], alphas[module] = part.rank, part.scale * part.rank
    if len(with_magnitude) > 1:
        raise ValueError(
            "DoRA and LoRA in one: got magnitudes for some weights, expected them for all or none, as PEFT holds them. "
            "Choose the layout 'host'."
        )
    return tensors, _peft_config(ranks, alphas, use_dora=with_magnitude == {True})


def _require_peft(target: Target, factor: Factor) -> None:
    by_columns = factor.magnitude is not None and factor.magnitude.shape[0] == 1
    if not isinstance(factor, LowRank) or by_columns or target.module == target.name:
        raise ValueError(
            f"Not for PEFT: got {factor.title} of {shorten(target.name)}, expected LoRA or DoRA of linear layers and "
            f"convolutions. Choose the layout 'host'."
        )


def _peft_config(ranks: Mapping[str, int], alphas: Mapping[str, float], use_dora: bool) -> dict:
    """The content of adapter_config.json. Source: PEFT, LoraConfig."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "alpha_pattern": {module: _plain(value) for module, value in alphas.items() if value != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "target_modules": sorted(ranks),
        "task_type": None,
        "use_dora": use_dora,
        "use_rslora": False,
    }


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _ready(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """On the CPU, contiguous, and in memory of its own; an alpha stays in float32."""
    wanted = tensor.dtype if dtype is None or name.endswith(".alpha") else dtype
    return tensor.detach().to(device="cpu", dtype=wanted).contiguous().clone()
