"""Make pictures without ComfyUI.

    python -m pixart sample --model PixArt-XL-2-1024-MS.pth --t5 t5xxl_fp16.safetensors --tokenizer t5/ \\
        --vae sd-vae-ft-ema/ --prompt "a cactus with a happy face" --preset "alpha DPM-Solver++ 20"
    python -m pixart sample --model PixArt-Sigma-XL-2-1024-MS/ --prompts prompts.txt --output pictures/ --batch 4
    python -m pixart sample --model PixArt-Sigma-XL-2-1024-MS/ --prompt "a harbour" --reference painting.png
    torchrun --nproc_per_node 8 -m pixart sample --model PixArt-Sigma-XL-2-1024-MS/ --prompts prompts.txt

A diffusers folder brings its own text encoder and autoencoder. With the seed and settings of a KSampler in ComfyUI the
pictures are the same to rounding. Started by `torchrun` or `accelerate launch`, the processes share the prompts, and
the pictures are those of one process; with --parallel guidance two processes make each picture.
"""

import argparse
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..acceleration.compilation import compile_blocks, explain_failure
from ..acceleration.guidance_reuse import LINE, GuidanceReuse
from ..acceleration.processors import own_dtype
from ..config import LATENT_DOWNSCALE, PixArtConfig
from ..data.pictures import FilePicture, read_picture
from ..encoders.autoencoder import load_autoencoder
from ..encoders.t5 import load_text_encoder
from ..files.atomic import write_atomically
from ..lora import describe_lora, merge, read_lora
from ..quoting import shorten
from ..reference.attention import Reference
from ..resolution import parse_prompt_flags
from ..sampling import Settings
from ..solvers import PRESETS, SAMPLERS, SCHEDULES, Asked, read_scheduler
from ..text import clean_prompt
from ..tracking.notes import KEY, to_parameters
from ..transformer import PixArt
from ..weights.folders import read_json
from ..weights.reading import read_checkpoint
from ..weights.saving import DTYPES
from .console import AUTO, add_device, add_weights, make_parser, own_device, tell
from .pipeline import Pipeline
from .team import Team

REUSE_START = 0.1  # of the steps: before, the picture forms
MOST_STRENGTH = 10.0  # of a reference
PROMPTS, GUIDANCE = PARALLEL = ("prompts", "guidance")
ENDS = {"official": None, "clean": True}  # for schedule_sigmas


def add_models(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options that `load_pipeline` reads."""
    models = parser.add_argument_group("models")
    models.add_argument("--model", type=Path, required=required, help="a checkpoint file, or a diffusers folder")
    models.add_argument("--t5", type=Path, help="the text encoder's file or folder; default: the diffusers folder's")
    models.add_argument("--tokenizer", type=Path, help="its folder; default: beside the text encoder")
    models.add_argument("--vae", type=Path, help="the autoencoder's file or folder; default: the diffusers folder's")
    models.add_argument(
        "--lora", action="append", default=[], metavar="PATH[:STRENGTH]", help="may be given several times"
    )
    models.add_argument("--strict", action="store_true", help="refuse a LoRA that fits the model only in part")
    models.add_argument("--variant", help="which released model it is, such as alpha-512, where the file does not say")
    add_weights(models)
    add_device(models, asks_file=True)
    models.add_argument(
        "--compile", action="store_true", help="compile a block of the model first, which needs a compiler; then faster"
    )


def load_pipeline(options: argparse.Namespace) -> Pipeline:
    """Model, text encoder and autoencoder. Raises FileNotFoundError and ValueError naming the file."""
    parts = {"--t5": options.t5, "--vae": options.vae}
    for (flag, given), folder in zip(list(parts.items()), ("text_encoder", "vae"), strict=True):
        own = options.model / folder
        if given is None and not own.is_dir():
            raise FileNotFoundError(
                f"No {folder.replace('_', ' ')}: got {options.model.name} without one, expected a diffusers folder "
                f"with {folder}/, or {flag}. Name the file or folder with {flag}."
            )
        parts[flag] = given or own
    hints = {"variant": options.variant} if options.variant else {}
    checkpoint = read_checkpoint(options.model, weights=options.weights, **hints)
    tell(options.model.name, checkpoint.remarks)
    dtype = DTYPES.get(options.dtype) or own_dtype(torch.device(options.device).type, _dtype_of(checkpoint.state_dict))
    if options.dtype == AUTO and dtype != torch.float32 and torch.device(options.device).type == "cpu":
        tell(options.model.name, ["computed in bf16, as the file is and this CPU can; --dtype fp32 for more digits"])
    with torch.device("meta"):
        model = PixArt(checkpoint.config)
    weights = add_loras(checkpoint.state_dict, checkpoint.config, options.lora, options.strict)
    weights = {name: tensor.to(options.device, dtype) for name, tensor in weights.items()}
    model.load_state_dict(weights, assign=True)
    # The networks that read texts and draw pictures overflow in fp16.
    safe = torch.float32 if dtype == torch.float16 else dtype
    text_encoder = load_text_encoder(parts["--t5"], options.tokenizer, safe, options.device)
    autoencoder = load_autoencoder(parts["--vae"], safe, options.device)
    model.eval().requires_grad_(False)
    if options.compile:
        compile_blocks(model, on_failure=explain_failure)
    return Pipeline(model, text_encoder, autoencoder)


def _dtype_of(weights: dict) -> torch.dtype:
    """The dtype of the largest weight, such as most are in."""
    return max(weights.values(), key=torch.Tensor.numel).dtype


def add_loras(weights: dict, config: PixArtConfig, texts: list[str], strict: bool) -> dict:
    """The weights (original layout) with LoRAs in them, one after another. texts: PATH or PATH:STRENGTH.

    Says what each is, and what of it did not fit. Raises FileNotFoundError and ValueError naming the LoRA.
    """
    for text in texts:
        path, strength = split_strength(text)
        if not path.exists():
            raise FileNotFoundError(
                f"No LoRA: got {shorten(text)}, expected a file or folder, or one with a strength such as "
                f"lora.safetensors:0.8. Correct the path."
            )
        lora = read_lora(path, config, strict=strict)
        tell(path.name, describe_lora(lora).splitlines())
        weights = merge(weights, lora, strength)
    return weights


def split_strength(text: str) -> tuple[Path, float]:
    """(path, strength) of PATH or PATH:STRENGTH."""
    match = re.fullmatch(r"(.+):(-?\d+(?:\.\d+)?)", text)
    return (Path(match[1]), float(match[2])) if match else (Path(text), 1.0)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that `read_settings` reads."""
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--preset", choices=list(PRESETS), help="a published setting; the options below change it")
    sampling.add_argument("--solver", choices=list(SAMPLERS), help="default: the diffusers folder's, else dpm_solver")
    sampling.add_argument("--schedule", choices=list(SCHEDULES), help="default: the diffusers folder's, else uniform")
    sampling.add_argument("--end", choices=list(ENDS), help="noise left at the end: 1 %% as the original, or none")
    sampling.add_argument("--steps", type=int, help="default: 20, for LCM 4")
    sampling.add_argument("--guidance", type=float, help="classifier-free guidance, 0 to 1 is off; default: 4.5")
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument(
        "--guidance-reuse", type=int, default=1, metavar="K",
        help="compute the negative prompt in one of K steps only: faster, nearly the same picture; default: every step",
    )  # fmt: skip


def read_settings(options: argparse.Namespace) -> Settings:
    """The preset's settings, or what the diffusers folder asks for, with what was given changed.

    Raises ValueError for a folder whose model was trained with another diffusion.
    """
    preset = PRESETS.get(options.preset)
    scheduler = _scheduler_of(options)
    if scheduler is not None:
        tell(options.model.name, (f"scheduler: {scheduler}", *scheduler.remarks))
        steps = scheduler.steps if options.steps is None else options.steps
        guidance = scheduler.guidance if options.guidance is None else options.guidance
        return Settings(scheduler.sampler, "folder", steps, guidance, scheduler.options(steps), scheduler=scheduler)
    settings = Settings()
    if preset:
        settings = Settings(preset.sampler, preset.schedule, preset.steps, preset.guidance, preset.options)
    solver = options.solver or settings.solver
    schedule = options.schedule or (settings.schedule if solver == settings.solver else _own_schedule(solver))
    return Settings(
        solver,
        schedule,
        settings.steps if options.steps is None else options.steps,
        settings.guidance if options.guidance is None else options.guidance,
        settings.options if solver == settings.solver else {},
        ENDS.get(options.end),
    )


def read_reuse(options: argparse.Namespace) -> GuidanceReuse | None:
    """What --guidance-reuse says; None for every step. Raises ValueError for less than 1."""
    reuse = GuidanceReuse(options.guidance_reuse, LINE, REUSE_START)
    return None if reuse.every == 1 else reuse


def _scheduler_of(options: argparse.Namespace) -> Asked | None:
    """What the model's folder asks for where nothing else is asked for."""
    chosen = (options.preset, options.solver, options.schedule, options.end)
    if options.model is None or any(each is not None for each in chosen):
        return None
    root = options.model.parent if options.model.name == "transformer" else options.model
    path = root / "scheduler" / "scheduler_config.json"
    return read_scheduler(read_json(path)) if path.is_file() else None


def _own_schedule(solver: str) -> str:
    return solver if solver in SCHEDULES else "uniform"


def parse() -> argparse.ArgumentParser:
    parser = make_parser("sample", __doc__)
    add_models(parser)
    add_settings(parser)
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--prompt", action="append", help="may be given several times")
    texts.add_argument("--prompts", type=Path, help="a text file with one prompt on each line")
    parser.add_argument("--negative", default="", help="what to avoid; default: the empty caption")
    parser.add_argument("--clean", action="store_true", help="clean all prompts as PixArt-alpha's captions were")
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels; default: the trained size, or --ar in the prompt")
    parser.add_argument("--batch", type=int, default=1, help="prompts at a time")
    parser.add_argument("--output", type=Path, default=Path("output"), help="the folder for the pictures")
    parser.add_argument("--force", action="store_true", help="overwrite pictures that are there")
    parser.add_argument(
        "--parallel", choices=PARALLEL, default=PROMPTS,
        help="what several processes share: the prompts (default), or each picture between two, of which one computes "
        "the prompt and one the negative",
    )  # fmt: skip
    reference = parser.add_argument_group("reference")
    reference.add_argument("--reference", type=Path, help="a picture that the pictures are to resemble")
    reference.add_argument("--reference-strength", type=float, default=1.0, help="0 is off; default: 1")
    reference.add_argument(
        "--reference-range", default="0:1", metavar="START:END", help="the part of the sampling that reads it"
    )
    return parser


def read_range(text: str) -> tuple[float, float]:
    """(start, end) of START:END, shares of the sampling. Raises ValueError for others."""
    match = re.fullmatch(r"(\d*\.?\d+):(\d*\.?\d+)", text)
    start, end = (float(match[1]), float(match[2])) if match else (1.0, 0.0)
    if not 0 <= start < end <= 1:
        raise ValueError(
            f"Part of the sampling out of range: got {shorten(text)}, expected START:END from 0 to 1 such as 0:0.8. "
            f"Correct it."
        )
    return start, end


def load_reference(options: argparse.Namespace, pipeline: Pipeline) -> Reference | None:
    """What --reference asks for. Raises FileNotFoundError, and ValueError for what is no picture or a bad range."""
    start, end = read_range(options.reference_range)
    if not 0 <= options.reference_strength <= MOST_STRENGTH:
        raise ValueError(
            f"Strength out of range: got {options.reference_strength:g}, expected 0 to {MOST_STRENGTH:g}. Correct it."
        )
    if options.reference is None:
        return None
    if not options.reference.is_file():
        raise FileNotFoundError(
            f"No reference: got {shorten(str(options.reference), 300)}, expected a picture. Correct the path."
        )
    pixels = read_picture(FilePicture(options.reference))
    return pipeline.read_reference(pixels, strength=options.reference_strength, start=start, end=end)


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts, without empty lines. Raises ValueError when there are none."""
    prompts = options.prompt or [line.strip() for line in options.prompts.read_text(encoding="utf-8-sig").splitlines()]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"No prompts: got an empty {options.prompts or 'text'}, expected one on each line.")
    return prompts


def picture_size(text: str | None, flags) -> tuple[int, int]:
    """(height_px, width_px). Raises ValueError for a size that is no multiple of 8 or not of the form 1024x768."""
    if text is None:
        return flags.bin_px
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    size = (int(match[2]), int(match[1])) if match else (0, 0)
    if min(size) < LATENT_DOWNSCALE or size[0] % LATENT_DOWNSCALE or size[1] % LATENT_DOWNSCALE:
        raise ValueError(f"Picture size out of range: got {text}, expected multiples of 8 such as 1024x768.")
    return size


def plan(prompts: list[str], options: argparse.Namespace, base_px: int) -> Iterator[tuple[tuple[int, int], list]]:
    """Batches of (size, [(number, text)]): prompts that follow each other and have one size."""
    batch, size = [], None
    for number, prompt in enumerate(prompts):
        flags = parse_prompt_flags(prompt, base_px)
        own = picture_size(options.size, flags)
        if batch and (own != size or len(batch) == options.batch):
            yield size, batch
            batch = []
        size = own
        batch.append((number, clean_prompt(flags.prompt) if options.clean else flags.prompt.strip()))
    yield size, batch


def describe_all(options: argparse.Namespace, settings: Settings, negative: str) -> tuple[dict, dict[str, object]]:
    """(what made all pictures, what else of it has no common word), for `to_parameters`."""
    loras = [split_strength(text) for text in options.lora]
    entry = {
        **{"negative": negative, "steps": settings.steps, "guidance": settings.guidance},
        **{"solver": settings.solver, "schedule": settings.schedule},
        "models": [
            {"name": f"{path.name}/" if path.is_dir() else path.name, "input": kind}
            for kind, path in (("checkpoint", options.model), ("vae", options.vae))
            if path is not None
        ],
        "loras": [{"name": path.name, "strength": strength} for path, strength in loras],
    }
    more = dict(settings.options)
    if settings.is_clean:
        more["End"] = "clean"
    if options.guidance_reuse > 1:
        more["Guidance reuse"] = options.guidance_reuse
    if options.reference is not None:
        strength, where = options.reference_strength, options.reference_range
        more["Reference"] = f"{options.reference.name} (strength {strength:g}, {where})"
    return entry, more


def make_team(options: argparse.Namespace, settings: Settings) -> Team:
    """The processes that share the work. Raises ValueError for two at a picture that has nothing for the second."""
    if options.parallel == PROMPTS:
        return Team()
    if 0 <= settings.guidance <= 1 or options.guidance_reuse > 1:
        raise ValueError(
            f"Nothing to share: got guidance {settings.guidance:g} and --guidance-reuse {options.guidance_reuse} with "
            f"--parallel guidance, expected a negative prompt at every step. Leave --parallel out."
        )
    return Team(2)


def main(options: argparse.Namespace) -> None:
    """Writes one PNG for each prompt, its settings within."""
    if options.batch < 1:
        raise ValueError(f"Batch size out of range: got {options.batch}, expected at least 1. Enter 1 or more.")
    options.device = own_device(options.device)
    settings, reuse, prompts = read_settings(options), read_reuse(options), read_prompts(options)
    paths = [options.output / f"{number:05}_{file_words(prompt)}.png" for number, prompt in enumerate(prompts)]
    there = [path for path in paths if path.exists()]
    if there and not options.force:
        raise FileExistsError(f"Picture exists: got {there[0]}, expected a new file. Use --force, or another --output.")
    with make_team(options, settings) as team:
        team.wait()  # all have looked for pictures before the first is made
        if team.rank < len(prompts):
            make_pictures(options, settings, reuse, prompts, paths, team)


def make_pictures(
    options: argparse.Namespace,
    settings: Settings,
    reuse: GuidanceReuse | None,
    prompts: list[str],
    paths: list[Path],
    team: Team,
) -> None:
    """Make this process's pictures: whole batches of all, so that each is the picture of a single process."""
    from tqdm import tqdm

    pipeline = load_pipeline(options)
    reference = load_reference(options, pipeline)
    options.output.mkdir(parents=True, exist_ok=True)
    negative = clean_prompt(options.negative) if options.clean else options.negative
    entry, more = describe_all(options, settings, negative)
    base_px = min((256, 512, 1024, 2048), key=lambda side: abs(side - pipeline.model.config.base_px))
    batches = team.share(list(plan(prompts, options, base_px)))
    partners = team if options.parallel == GUIDANCE else None
    total = sum(len(batch) for _, batch in batches) * settings.steps
    with tqdm(total=total, unit="step", disable=not team.leads) as bar:
        for (height, width), batch in batches:
            texts = [text for _, text in batch]
            seeds = [options.seed + number for number, _ in batch]
            on_step = partial(_advance, bar, len(texts))
            given = texts, negative, height, width, seeds, settings, on_step, reuse, reference, partners
            pictures = pipeline.generate(*given)
            if team.place > 0:
                continue
            for (number, text), seed, picture in zip(batch, seeds, to_pictures(pictures), strict=True):
                notes = PngInfo()
                own = {"prompt": text, "seed": seed, "width": width, "height": height}
                notes.add_itxt(KEY, to_parameters({**entry, **own}, more))
                write_atomically(paths[number], partial(picture.save, format="PNG", pnginfo=notes))


def to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """(B, H, W, 3) in [0, 1] -> pictures."""
    return [Image.fromarray(each.numpy()) for each in (pixels * 255).round().to(torch.uint8)]


def _advance(bar, count: int, _state: dict) -> None:
    bar.update(count)


def file_words(prompt: str) -> str:
    """The first words of a prompt as a part of a file's name."""
    return re.sub(r"\W+", "-", prompt.lower())[:40].strip("-") or "picture"
