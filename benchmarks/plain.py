"""Speed of the model alone, without ComfyUI: `python benchmarks/plain.py --device cuda --dtypes bf16`.

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

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # as a script there is no package around this file, so the root is put onto the path
    sys.path.insert(0, str(ROOT))


def _import(name):
    """A module of the pack, by its path from the root."""
    return importlib.import_module(f"..{name}" if __package__ else name, __package__)


pixart, samplers, schedules = _import("pixart"), _import("samplers"), _import("samplers.schedules")
cases, timing = _import("benchmarks.cases"), _import("benchmarks.timing")
CONFIGS = pixart.CONFIGS

logger = logging.getLogger(__name__)


def make_model(variant, depth, dtype, device):
    """A PixArt with random weights; depth 0: the variant's own."""
    config = CONFIGS[variant] if not depth else dataclasses.replace(CONFIGS[variant], depth=depth)
    model = pixart.PixArt(config, dtype=dtype, device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.02, generator=generator)
    return model


def make_forward(model, runner, case, device):
    """(function of one forward pass, operations, bytes) of a case. The caption is projected before."""
    dtype, longest = cases.DTYPES[case.dtype], max(case.lengths)
    latent = torch.randn(case.batch, model.config.in_channels, *[case.side_px // 8] * 2, device=device, dtype=dtype)
    states = torch.randn(case.batch, longest, model.config.caption_channels, device=device, dtype=dtype)
    caption, time = model.project_caption(states), torch.full((case.batch,), 500.0, device=device)
    mask = torch.arange(longest, device=device) < torch.tensor(case.lengths, device=device)[:, None]
    mask = None if mask.all() else mask
    work = timing.count_work(model.config, case.batch, case.tokens, longest, dtype.itemsize)
    return lambda: runner(latent, time, caption, mask), *work


def make_loop(model, runner, case, steps, device):
    """As make_forward, of so many guided steps; the caption is projected in the loop."""
    dtype = cases.DTYPES[case.dtype]
    states = torch.randn(2, max(case.lengths), model.config.caption_channels, device=device, dtype=dtype)
    noise = torch.randn(1, model.config.in_channels, *[case.side_px // 8] * 2, device=device)
    levels = schedules.schedule_sigmas("uniform", steps).float().to(device)
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

    work = timing.count_work(model.config, 2, case.tokens, max(case.lengths), dtype.itemsize)
    return run, *(steps * amount for amount in work)


def main(arguments=None):
    """Print the seconds of every case beside its roofline, and write them as JSON where --out says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variant", choices=CONFIGS, default="sigma-512")
    cases.add_options(parser, dtypes=["fp32"])
    parser.add_argument("--steps", type=int, default=20, help="of a guided loop of the first case; 0 for none")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = cases.parse_run(parser, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with torch.inference_mode():
        results = [result for dtype in options.dtypes for result in measure(dtype, options)]
    if options.out:
        told = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.out.write_text(json.dumps({"options": told, "cases": results}, indent=1) + "\n", encoding="utf-8")


def measure(dtype, options):
    """Yields seconds and roofline of every case of a dtype."""
    device = options.device
    best = timing.measure_roofline(device, cases.DTYPES[dtype], options.clock)
    logger.info("%s, at best: %.3g operations/s, %.3g bytes/s", dtype, best.operations, best.bandwidth)
    model = make_model(options.variant, options.depth, cases.DTYPES[dtype], device)
    runner = torch.compile(model) if options.compile else model
    chosen = [case for case in cases.list_cases(options) if case.dtype == dtype]
    programs = {str(case): make_forward(model, runner, case, device) for case in chosen}
    if options.steps:
        label = f"{options.steps} guided steps, {chosen[0]}"
        programs[label] = make_loop(model, runner, chosen[0], options.steps, device)
    for label, (run, operations, moved) in programs.items():
        seconds = timing.take_turns({"": run}, options.rounds, options.clock, device)[""]
        median, least = statistics.median(seconds), best.seconds(operations, moved)
        logger.info("%s: %.4g s, roofline %.4g s (%.0f %%)", label, median, least, 100 * least / median)
        yield {"case": label, "seconds": seconds, "roofline_s": least}


if __name__ == "__main__":
    main()
