"""One forward pass of the denoiser: this pack's, ComfyUI's own, and diffusers'.

The same random weights, inputs and threads; the runs take turns. Each is fed as its own sampling loop feeds it, at a
step after the first: a batch of 2 is a prompt and its negative. So captions are padded to the trained length under a
mask in diffusers, and ComfyUI evaluates two of different length one after the other.
"""

import argparse
import logging
import statistics
from functools import partial
from pathlib import Path

import torch

from .cases import DTYPES, add_options, list_cases, name_device, parse_run
from .host import import_host
from .loop import WARM_UP_SIDE
from .peers import DIFFUSERS, HOST, OURS, DiffusersLoop, HostLoop, OurLoop, make_captions, make_config, make_weights
from .report import RESULTS, describe_ratio, keep_runs, markdown_table
from .timing import compare, count_work, measure_roofline, take_turns

LOOPS = {OURS: OurLoop, HOST: HostLoop, DIFFUSERS: DiffusersLoop}

logger = logging.getLogger(__name__)


def main(arguments):
    """Run the benchmark and write results/denoiser.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks denoiser", description=__doc__)
    add_options(parser, dtypes=["fp32"], batches=(1, 2))
    parser.add_argument("--family", choices=("alpha", "sigma"), default="alpha")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parse_run(parser, arguments)
    device = options.device
    import_host(device)
    made, loops, text = None, {}, ""
    for case in list_cases(options):
        variant = f"{options.family}-{case.side_px}"
        if made != (variant, case.dtype):  # one size's models at a time
            loops.clear()
            loops |= make_loops(make_config(variant, options.depth), DTYPES[case.dtype], device, options.compiled)
            made = variant, case.dtype
        run = measure(case, make_config(variant, options.depth), loops, options, device)
        text = publish([{**run, "case": {"variant": variant, **run["case"]}}], options.out)
    logger.info("%s", text)


def make_loops(config, dtype, device, compiled):
    """Every rival by its name, with the same weights."""
    weights = make_weights(config, dtype)
    loops = {name: kind(config, weights, dtype, device) for name, kind in LOOPS.items()}
    for loop in loops.values():
        if compiled:
            loop.compile()
    return loops


def measure(case, config, loops, options, device):
    """Seconds and ratios of one case, and what those say that fail."""
    captions = make_captions(config, case.lengths, DTYPES[case.dtype])
    side = case.side_px // 8
    small = side if options.compiled else min(side, WARM_UP_SIDE)
    seconds, failures = {}, {}

    def enter(names, predictors):
        if not names:
            seconds.update(take_turns(predictors, options.rounds, options.clock, device, {}))  # all are warm
            return
        name, *others = names
        loops[name].use_step(captions, side, partial(warm_up, name, others, predictors))

    def warm_up(name, others, predictors, predict):
        try:
            predict(small)
        except Exception as error:  # noqa: BLE001  whatever it is, is the result
            failures[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
            enter(others, predictors)
        else:
            enter(others, {**predictors, name: predict})

    with torch.inference_mode():
        enter(list(loops), {})
        best = measure_roofline(device, loops[OURS].maths, options.clock)
    work = count_work(config, case.batch, case.tokens, max(case.lengths), DTYPES[case.dtype].itemsize)
    return {
        "case": {
            "side_px": case.side_px,
            "batch": case.batch,
            "captions": list(case.lengths),
            "dtype": case.dtype,
            "maths": next(name for name, dtype in DTYPES.items() if dtype == loops[OURS].maths),
            "compiled": options.compiled,
            "blocks": config.depth,
            "device": name_device(device),
            "threads": torch.get_num_threads(),
            "clock": options.clock,
        },
        "seconds": seconds,
        "failures": failures,
        "ratios": {name: compare(seconds, OURS, name) for name in seconds if name != OURS and OURS in seconds},
        "roofline_s": best.seconds(*work),
    }


def publish(runs, folder):
    """Add runs to denoiser.json and write denoiser.md again. Returns its text."""
    rows = []
    for run in keep_runs(folder / "denoiser.json", runs):
        case, ours = run["case"], run["seconds"].get(OURS)
        maths = f" (ComfyUI computes in {case['maths']})" * (case["maths"] != case["dtype"])
        settings = f"{case['dtype']}{maths}, {case['device']}, {case['threads']} threads, {case['clock']} time"
        cells = [case["variant"], case["blocks"], case["batch"], " and ".join(map(str, case["captions"]))]
        cells += [settings, "yes" if case["compiled"] else "no", max(map(len, run["seconds"].values()), default=0)]
        cells.append(f"{statistics.median(ours):.3g} s" if ours else f"fails: {run['failures'][OURS]}")
        cells.append(f"{run['roofline_s']:.3g} s")
        for name in (HOST, DIFFUSERS):
            said = run["failures"].get(name)
            cells.append(f"fails: {said}" if said else describe_ratio(run["ratios"].get(name)))
        rows.append(cells)
    head = ["variant", "blocks", "batch", "captions", "settings", "compiled", "rounds", OURS, "roofline"]
    text = "One forward pass at the variant's size, at a step after the first; time of this pack and over others':\n\n"
    text += markdown_table([*head, f"over {HOST}'s own", f"over {DIFFUSERS}"], rows)
    (folder / "denoiser.md").write_text(text, encoding="utf-8")
    return text
