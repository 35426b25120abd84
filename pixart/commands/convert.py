"""Convert checkpoints, ControlNets, LoRAs and T5 text encoders between the layouts that programs read.

    python -m pixart convert PixArt-XL-2-1024-MS.pth pixart.safetensors --dtype fp16
    python -m pixart convert PixArt-XL-2-1024-MS.pth PixArt-diffusers/ --to diffusers
    python -m pixart convert diffusers-folder/ model.pth
    python -m pixart convert peft-folder/ lora.safetensors --to kohya
    python -m pixart convert text_encoder/ t5xxl_bf16.safetensors --dtype bf16
    python -m pixart convert DiT-XL-2-256x256.pt pixart.safetensors
    python -m pixart convert PixArt-XL-2-512x512.pth grown.safetensors --grow alpha-1024
    python -m pixart convert text_encoder/ t5xxl_q8_0.gguf --gguf-type Q8_0

What the file is, is read from its content. A DiT becomes a PixArt that is to be trained.
A name without an ending is a folder in diffusers' or PEFT's layout.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..files.atomic import write_atomically, write_folder_atomically
from ..lora import LAYOUTS as LORA_LAYOUTS
from ..lora import PEFT_CONFIG, export_notes, read_lora, save_lora
from ..quoting import shorten
from ..stages.dit import is_dit, is_dit_folder, read_dit
from ..stages.growth import grow_checkpoint
from ..weights.controlnets import read_controlnet, save_controlnet
from ..weights.layouts import CONFIG_KEY, CONTROL, CONTROLNET, LORA, T5
from ..weights.quantised.gguf_saving import PIXART, t5_fields, write_gguf
from ..weights.quantised.gguf_saving import SUFFIX as GGUF_SUFFIX
from ..weights.quantised.gguf_saving import T5 as T5_ENCODER
from ..weights.quantised.gguf_saving import TYPES as GGUF_TYPES
from ..weights.reading import naming, open_weights, read_checkpoint
from ..weights.saving import DTYPES, lost_in_diffusers, names_file, save_checkpoint
from ..weights.t5 import is_t5_folder, read_encoder
from ..weights.wrappers import identify, to_diffusers
from .console import add_weights, make_parser, tell

MODEL_LAYOUTS = ("original", "diffusers")
T5_LAYOUTS = ("single", "folder")
GGUF_KINDS = ("checkpoint", "dit", "t5")
KIND_OF_LAYOUT = {CONTROL: "controlnet", CONTROLNET: "controlnet", LORA: "lora", T5: "t5"}


@dataclass(frozen=True)
class Kind:
    """layouts: that --to may name, the default first. convert: (options, layout, dtype) -> what it wrote, in words."""

    layouts: tuple[str, ...]
    convert: Callable[[argparse.Namespace, str, torch.dtype | None], str]


def _convert_checkpoint(options, layout, dtype):
    hints = {"variant": options.variant} if options.variant else {}
    return _write_checkpoint(read_checkpoint(options.source, weights=options.weights, **hints), options, layout, dtype)


def _convert_dit(options, layout, dtype):
    return _write_checkpoint(read_dit(options.source, weights=options.weights), options, layout, dtype)


def _write_checkpoint(checkpoint, options, layout, dtype):
    if options.grow:
        checkpoint = grow_checkpoint(checkpoint, options.grow)
    tell(options.source.name, checkpoint.remarks)
    found = f"PixArt-{checkpoint.detection.family} trained at {checkpoint.config.base_px} px"
    if options.target.suffix == GGUF_SUFFIX:
        weights = checkpoint.state_dict if layout == "original" else to_diffusers(checkpoint.state_dict)
        texts = {CONFIG_KEY: json.dumps(asdict(checkpoint.config))}
        write_gguf(options.target, weights, PIXART, options.gguf_type, texts)
        return found
    shard_bytes = int(options.shard_gb * 1e9) if options.shard_gb else None
    save_checkpoint(
        options.target, checkpoint.state_dict, checkpoint.config, layout, dtype, checkpoint.metadata, shard_bytes
    )
    if layout == "diffusers":
        tell(options.target.name, lost_in_diffusers(checkpoint.config))
    return found


def _convert_controlnet(options, layout, dtype):
    hints = {"variant": options.variant} if options.variant else {}
    control = read_controlnet(options.source, weights=options.weights, **hints)
    # Only the original's files hold a base model beside the control.
    base = control.base.state_dict if control.base and layout == "original" and names_file(options.target) else None
    save_controlnet(options.target, control.state_dict, control.config, layout, dtype, base=base)
    return f"a ControlNet of {control.num_copies} blocks{' with its base model' if base else ''}"


def _convert_lora(options, layout, dtype):
    lora = read_lora(options.source, strict=options.strict)
    save_lora(options.target, lora.factors, layout=layout, metadata=lora.metadata, dtype=dtype)
    tell(options.source.name, export_notes(lora, layout))
    return f"a LoRA of {len(lora.factors)} layers"


def _convert_t5(options, layout, dtype):
    source = options.source
    weights, sizes = read_encoder(source, dtype)
    config = {**sizes, "feed_forward_proj": "gated-gelu"}
    found = f"a T5 encoder of {sizes['num_layers']} layers and width {sizes['d_model']}"
    if options.target.suffix == GGUF_SUFFIX:
        write_gguf(options.target, weights, T5_ENCODER, options.gguf_type, numbers=t5_fields(sizes))
        return found
    weights = {name: tensor.to(dtype).contiguous() if dtype else tensor for name, tensor in weights.items()}

    def write(path: Path) -> None:
        save_file(weights, path, metadata={"format": "pt", "t5_config": json.dumps(config)})

    def fill(folder: Path) -> None:
        write(folder / "model.safetensors")
        texts = {"architectures": ["T5EncoderModel"], "model_type": "t5", **config}
        (folder / "config.json").write_text(json.dumps(texts, indent=2) + "\n", encoding="utf-8")

    if layout == "single":
        write_atomically(options.target, write)
    else:
        write_folder_atomically(options.target, fill)
    return found


KINDS = {
    "checkpoint": Kind(MODEL_LAYOUTS, _convert_checkpoint),
    "dit": Kind(MODEL_LAYOUTS, _convert_dit),
    "controlnet": Kind(MODEL_LAYOUTS, _convert_controlnet),
    "lora": Kind(LORA_LAYOUTS, _convert_lora),
    "t5": Kind(T5_LAYOUTS, _convert_t5),
}


def detect_kind(source: Path) -> str:
    """The key of KINDS that a file or folder is. Raises FileNotFoundError, ValueError for what cannot be read."""
    if not source.exists():
        raise FileNotFoundError(
            f"Not found: got {shorten(str(source), 300)}, expected a file or folder. Correct the path."
        )
    if source.is_dir():
        if any(source.glob(PEFT_CONFIG)) or any(source.glob(f"*/{PEFT_CONFIG}")):
            return "lora"
        if (source / "transformer").is_dir():
            return "dit" if is_dit_folder(source / "transformer") else "checkpoint"
        if is_t5_folder(source):
            return "t5"
        files = [path for path in sorted(source.iterdir()) if path.suffix in (".safetensors", ".bin")]
        return detect_kind(files[0]) if files else "checkpoint"
    with naming(source):
        found = identify(open_weights(source).content)
        return "dit" if is_dit(found) else KIND_OF_LAYOUT.get(found.layout, "checkpoint")


def choose_layout(kind: Kind, options: argparse.Namespace) -> str:
    """What --to says; without it, what the target's name says. Raises ValueError for another kind's layout."""
    if options.to is None:
        is_file = names_file(options.target) or options.target.suffix == GGUF_SUFFIX
        return kind.layouts[0] if is_file else {"host": "peft"}.get(kind.layouts[0], kind.layouts[1])
    if options.to not in kind.layouts:
        raise ValueError(
            f"Layout does not fit: got --to {options.to}, expected {' or '.join(kind.layouts)} for this file. "
            f"Choose one of them."
        )
    return options.to


def main(options: argparse.Namespace) -> None:
    """Writes the target and says what it is. Raises FileExistsError unless --force."""
    name = options.kind or detect_kind(options.source)
    layout = choose_layout(KINDS[name], options)
    target = options.target
    if target.suffix == GGUF_SUFFIX and name not in GGUF_KINDS:
        raise ValueError(f"No GGUF of this kind: got {name}, expected {' or '.join(GGUF_KINDS)}. Write safetensors.")
    if target.exists() and not options.force and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(
            f"Exists already: got {shorten(str(target), 300)}, expected a new name. Use --force to replace it."
        )
    if target.exists() and target.resolve() == options.source.resolve():
        raise ValueError(f"Source and target are the same: got {shorten(str(target), 300)}, expected another name.")
    replaced = target if target.is_dir() and any(target.iterdir()) else None
    if replaced:
        _require_model_folder(replaced)
        options.target = replaced.with_name(f"{replaced.name}.new")
    found = KINDS[name].convert(options, layout, DTYPES.get(options.dtype))
    if replaced:  # only now: a failed conversion leaves the old one
        shutil.rmtree(replaced)
        options.target.rename(replaced)
    sys.stdout.write(f"{target}: {found}, {layout} layout\n")


def _require_model_folder(folder: Path) -> None:
    """Raises ValueError for a folder that holds more than what this command writes."""
    own = {".json", ".safetensors", ".bin"}
    strange = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in own]
    if strange:
        raise ValueError(
            f"Folder is not a model's alone: got {shorten(strange[0])}, expected only model files in a folder that "
            f"--force is to replace. Choose another name."
        )


def parse() -> argparse.ArgumentParser:
    parser = make_parser("convert", __doc__)
    parser.add_argument("source", type=Path, help="a file or folder")
    parser.add_argument("target", type=Path, help="a .safetensors, .pth or .gguf file, or a folder")
    parser.add_argument("--kind", choices=list(KINDS), help="default: by the content")
    layouts = ", ".join(f"{name}: {' | '.join(kind.layouts)}" for name, kind in KINDS.items())
    parser.add_argument("--to", metavar="LAYOUT", help=layouts)
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: as it is")
    add_weights(parser)
    parser.add_argument("--variant", help="which released model it is, such as alpha-512, where the file does not say")
    parser.add_argument("--grow", metavar="STAGE", help="bring a model to another size or family, see train --grow")
    parser.add_argument("--gguf-type", choices=GGUF_TYPES, default="Q8_0", help="of a .gguf target; default: Q8_0")
    parser.add_argument("--shard-gb", type=float, help="largest file of a diffusers folder; default: one file")
    parser.add_argument("--strict", action="store_true", help="refuse a LoRA that is read only in part")
    parser.add_argument("--force", action="store_true", help="replace a target that is there")
    return parser
