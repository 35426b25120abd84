"""Speed of the model alone, without ComfyUI: `python benchmarks/plain.py --device cuda --dtype bf16`.

Needs torch, numpy, einops and safetensors beside `pixart/` and `samplers/`. Weights are random. Beside each figure
stands the roofline: the least time by the operations and bytes counted and the rates measured on this machine.
"""

import argparse
import dataclasses
import importlib
import json
import logging
import statistics
import sys
from pathlib import Path

import torch


def _import(name, level):
    """A module of the pack; as a script, there is no package around this file and the root is put onto the path."""
    if __package__:
        return importlib.import_module("." * level + name, __package__)
    return importlib.import_module(name)


if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pixart, samplers = _import("pixart", 2), _import("samplers", 2)
schedules, timing = _import("samplers.schedules", 2), _import("timing", 1)
CONFIGS = pixart.CONFIGS
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

logger = logging.getLogger(__name__)


def make_model(variant, depth, dtype, device):
    """A PixArt with random weights; depth 0: the variant's own."""
    config = CONFIGS[variant] if not depth else dataclasses.replace(CONFIGS[variant], depth=depth)
    model = pixart.PixArt(config, dtype=dtype, device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.02, generator=generator)
    return model


def make_cases(model, options):
    """(label, function, operations, bytes) of every forward pass and of the loop."""
    dtype, device = DTYPES[options.dtype], options.device
    runner = torch.compile(model) if options.compile else model
    for side_px in options.sides_px:
        for batch in options.batches:
            for length in options.captions:
                side = side_px // 8
                latent = torch.randn(batch, 4, side, side, device=device, dtype=dtype)
                states = torch.randn(batch, length, model.config.caption_channels, device=device, dtype=dtype)
                caption, time = model.project_caption(states), torch.full((batch,), 500.0, device=device)
                tokens = (side // 2) ** 2
                work = timing.count_work(model.config, batch, tokens, length, dtype.itemsize)
                label = f"{side_px} px, batch {batch}, caption {length}"
                yield label, lambda args=(latent, time, caption): runner(*args), *work
    yield _make_loop(model, runner, options)


def _make_loop(model, runner, options):
    dtype, device, side = DTYPES[options.dtype], options.device, options.sides_px[0] // 8
    states = torch.randn(2, options.captions[0], model.config.caption_channels, device=device, dtype=dtype)
    noise = torch.randn(1, 4, side, side, device=device)
    levels = schedules.schedule_sigmas("uniform", options.steps).float().to(device)
    alphas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    table = torch.log1p(1 / (1 - alphas).cumprod(0) - 1).to(device, torch.float32)

    def run():
        caption = model.project_caption(states)

        def denoise(x, sigma, **_):
            level = torch.log1p(sigma.square())
            time = (torch.searchsorted(table, level).clamp(1, 999) - 0.5).float()
            scaled = (x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()).to(dtype)
            both = runner(scaled.repeat(2, 1, 1, 1), time.repeat(2), caption)[:, :4].float()
            told, untold = both.chunk(2)
            return x - sigma.view(-1, 1, 1, 1) * (untold + 4.5 * (told - untold))

        samplers.SAMPLERS["dpm_solver"](denoise, noise * levels[0], levels, disable=True)

    work = timing.count_work(model.config, 2, (side // 2) ** 2, options.captions[0], dtype.itemsize)
    label = f"{options.steps} guided steps at {options.sides_px[0]} px"
    return label, run, *(options.steps * amount for amount in work)


def main(arguments=None):
    """Print the seconds of every case beside its roofline, and write them as JSON where --out says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--variant", choices=CONFIGS, default="sigma-512")
    parser.add_argument("--depth", type=int, default=0, help="blocks (default: all)")
    parser.add_argument("--sides-px", type=int, nargs="+", default=[512])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--captions", type=int, nargs="+", default=[20, 120], help="tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dtype = DTYPES[options.dtype]
    results = []
    with torch.inference_mode():
        best = timing.measure_roofline(options.device, dtype, options.clock)
        model = make_model(options.variant, options.depth, dtype, options.device)
        logger.info("best: %.3g operations/s, %.3g bytes/s", best.operations, best.bandwidth)
        for label, run, operations, moved in make_cases(model, options):
            seconds = timing.take_turns({"": run}, options.rounds, options.clock, options.device)[""]
            median, least = statistics.median(seconds), best.seconds(operations, moved)
            logger.info("%s: %.4g s, roofline %.4g s (%.0f %%)", label, median, least, 100 * least / median)
            results.append({"case": label, "seconds": seconds, "roofline_s": least})
    if options.out:
        told = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.out.write_text(json.dumps({"options": told, "cases": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
