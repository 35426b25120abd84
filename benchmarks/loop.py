"""A guided sampling loop with captions of different length: this pack, ComfyUI's own PixArt, and diffusers.

The same random weights, inputs and threads; their steps take turns.
"""

import argparse
import functools
import logging
from pathlib import Path

import torch

from .cases import DTYPES, name_device, parse_run
from .host import import_host
from .peers import DIFFUSERS, HOST, OURS, DiffusersLoop, HostLoop, OurLoop, make_captions, make_config, make_weights
from .report import RESULTS, describe_ratio, keep_runs, markdown_table
from .timing import compare_loops, count_work, measure_roofline, take_turns_in_steps

WARM_UP_SIDE = 36  # of the latent, at most; ComfyUI's own divides by zero at 32

logger = logging.getLogger(__name__)


def main(arguments):
    """Run the benchmark and write results/loop.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks loop", description=__doc__)
    parser.add_argument("--variants", nargs="+", default=["alpha-256", "alpha-512", "sigma-256", "sigma-512"])
    parser.add_argument("--depth", type=int, default=0, help="blocks (default: all)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--captions", type=int, nargs=2, default=[40, 1], help="tokens of positive and negative")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parse_run(parser, arguments, rounds=None)
    import_host(options.device)
    for variant in options.variants:
        text = publish([measure(variant, options, options.device)], options.out)
    logger.info("%s", text)


def measure(variant, options, device):
    """Seconds and ratios of one variant at its trained size."""
    dtype, config = DTYPES[options.dtype], make_config(variant, options.depth)
    weights = make_weights(config, dtype)
    captions = make_captions(config, options.captions, dtype)
    side = config.base_size * config.patch_size
    loops = {OURS: OurLoop(config, weights, dtype, device)}
    if config.base_px > 256:  # ComfyUI's own divides by zero there
        loops[HOST] = HostLoop(config, weights, dtype, device)
    loops[DIFFUSERS] = DiffusersLoop(config, weights, dtype, device)
    rivals = {name: functools.partial(loop.sample, captions, side, options.steps) for name, loop in loops.items()}
    for loop in loops.values():
        loop.sample(captions, min(side, WARM_UP_SIDE), 1)
    before = measure_roofline(device, dtype, options.clock)
    seconds = take_turns_in_steps(rivals, options.clock, device)
    best = before.or_better(measure_roofline(device, dtype, options.clock))
    work = count_work(config, 2, config.base_size**2, max(options.captions), dtype.itemsize)
    return {
        "case": {
            "variant": variant,
            "blocks": config.depth,
            "steps": options.steps,
            "captions": options.captions,
            "dtype": options.dtype,
            "device": name_device(device),
            "threads": torch.get_num_threads(),
            "clock": options.clock,
        },
        "seconds": seconds,
        "ratios": {name: compare_loops(seconds, OURS, name) for name in rivals if name != OURS},
        "roofline_s": best.seconds(*(options.steps * amount for amount in work)),
    }


def publish(runs, folder):
    """Add runs to loop.json and write loop.md again. Returns its text."""
    rows = []
    for run in keep_runs(folder / "loop.json", runs):
        case, taken_s = run["case"], sum(run["seconds"][OURS])
        settings = f"{case['dtype']}, {case['device']}, {case['threads']} threads, {case['clock']} time"
        rows.append(
            [case["variant"], case["blocks"], case["steps"], case["captions"], settings]
            + [f"{taken_s:.2f} s", f"{run['roofline_s']:.2f} s"]
            + [describe_ratio(run["ratios"].get(name)) for name in (HOST, DIFFUSERS)]
        )
    head = ["variant", "blocks", "steps", "captions", "settings", OURS, "roofline"]
    text = "Guided loops of dpmpp_2m with captions of so many tokens, time of this pack and over others'\n"
    text += "(in brackets: of the middle half of the steps, which take turns):\n\n"
    text += markdown_table([*head, f"over {HOST}'s own", f"over {DIFFUSERS}"], rows)
    (folder / "loop.md").write_text(text, encoding="utf-8")
    return text
