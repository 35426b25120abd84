"""A guided sampling loop with captions of different length: this pack, ComfyUI's own PixArt, and diffusers.

The same random weights, inputs and threads; the runs take turns.
"""

import argparse
import json
import logging
import statistics
from pathlib import Path

import torch

from .peers import DiffusersLoop, HostLoop, OurLoop, make_captions, make_config, make_weights
from .plain import DTYPES
from .report import RESULTS, markdown_table
from .timing import CLOCKS, compare, count_work, measure_roofline, take_turns

OURS = "this pack"

logger = logging.getLogger(__name__)


def main(arguments):
    """Run the benchmark and write results/loop.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks loop", description=__doc__)
    parser.add_argument("--variants", nargs="+", default=["alpha-256", "alpha-512", "sigma-256", "sigma-512"])
    parser.add_argument("--depth", type=int, default=0, help="blocks (default: all)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--captions", type=int, nargs=2, default=[40, 1], help="tokens of positive and negative")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=0, help="default: PyTorch's")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        best = measure_roofline(device, DTYPES[options.dtype], options.clock)
    results = {variant: measure(variant, options, device, best) for variant in options.variants}
    settings = (
        f"{options.depth or 'all'} blocks of XL/2, {options.steps} steps, captions of {options.captions} tokens, "
    )
    settings += f"{options.dtype}, {device}, {torch.get_num_threads()} threads, {options.clock} time, "
    settings += f"{options.rounds} rounds"
    options.out.mkdir(parents=True, exist_ok=True)
    text = f"{settings}:\n\n{_table(results)}"
    (options.out / "loop.json").write_text(json.dumps({"settings": settings, "runs": results}, indent=1) + "\n")
    (options.out / "loop.md").write_text(text, encoding="utf-8")
    logger.info("%s", text)


def measure(variant, options, device, best):
    """Seconds and ratios of one variant at its trained size."""
    dtype, config = DTYPES[options.dtype], make_config(variant, options.depth)
    weights = make_weights(config, dtype)
    captions = make_captions(config, options.captions, dtype)
    side = config.base_size * config.patch_size
    loops = {OURS: OurLoop(config, weights, dtype)}
    if config.base_px > 256:  # ComfyUI's own divides by zero there
        loops["ComfyUI"] = HostLoop(config, weights, dtype)
    if device == "cpu":
        loops["diffusers"] = DiffusersLoop(config, weights, dtype)
    rivals = {name: lambda loop=loop: loop.sample(captions, side, options.steps) for name, loop in loops.items()}
    seconds = take_turns(rivals, options.rounds, options.clock, device)
    work = count_work(config, 2, config.base_size**2, max(options.captions), dtype.itemsize)
    return {
        "seconds": seconds,
        "ratios": {name: compare(seconds, OURS, name) for name in rivals if name != OURS},
        "roofline_s": best.seconds(*(options.steps * amount for amount in work)),
    }


def _table(results):
    rows = []
    for variant, run in results.items():
        median = statistics.median(run["seconds"][OURS])
        cells = [variant, f"{median:.2f} s", f"{run['roofline_s']:.2f} s"]
        for name in ("ComfyUI", "diffusers"):
            found = run["ratios"].get(name)
            cells.append(
                f"{found['ratio']:.2f} ({found['least']:.2f} to {found['greatest']:.2f})" if found else "not run"
            )
        rows.append(cells)
    return markdown_table(["variant", "this pack", "roofline", "over ComfyUI's own", "over diffusers"], rows)
