"""One guided picture in this pack's ways to make it quicker, beside ComfyUI's own PixArt and diffusers.

The same random weights, inputs and threads, in turns. What caches leave out depends on what a model has learned: what
they change in a picture is measured on the demo model (`benchmarks dials` and `benchmarks caches`).
"""

import argparse
import logging
import statistics
import time
from pathlib import Path

import torch

from .cases import DTYPES, name_device, parse_run
from .host import import_host
from .peaks import measure_peak
from .peers import DIFFUSERS, HOST, DiffusersLoop, HostLoop, OurLoop, make_captions, make_config, make_weights
from .peers import sample_in_host as sample
from .report import RESULTS, describe_ratio, keep_runs, markdown_table
from .timing import compare, take_turns

EXACT, COMPILED, CACHED, REUSED = "exact", "compiled", "block cache", "guidance reuse"
QUICKEST = "compiled, input cache and guidance reuse"
FEW = "in few steps without guidance, as LCM"

logger = logging.getLogger(__name__)


def main(arguments):
    """Run the benchmark and write results/ways.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks ways", description=__doc__)
    parser.add_argument("--variant", default="alpha-1024")
    parser.add_argument("--depth", type=int, default=0, help="blocks (default: all)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lcm-steps", type=int, default=4)
    parser.add_argument("--captions", type=int, nargs=2, default=[40, 1], help="tokens of positive and negative")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parse_run(parser, arguments)
    import_host(options.device)
    text = publish([measure(options)], options.out)
    logger.info("%s", text)


def turn_dials(patcher) -> dict:
    """The MODEL in each way, by its name. Raises RuntimeError where blocks cannot be compiled."""
    from ..nodes.host.denoiser.acceleration import FORECASTS, MODES, cache_blocks, reuse_guidance
    from ..nodes.host.denoiser.compilation import compile_model

    def reuse(model):
        return reuse_guidance(model, 2, FORECASTS[0], 0.1, 1.0)[0]

    def compiled(model):
        found, trouble = compile_model(model)
        if trouble:
            raise RuntimeError(trouble)
        return found

    return {
        EXACT: patcher,
        COMPILED: compiled(patcher),
        CACHED: cache_blocks(patcher, 0.3, 1, 0, 0.1, 1.0, 3),
        REUSED: reuse(patcher),
        QUICKEST: compiled(reuse(cache_blocks(patcher, 0.2, 1, 0, 0.1, 1.0, 3, MODES[-1]))),
    }


def measure(options) -> dict:
    """Seconds of every round, of the first picture, and bytes beside the weights, of each way and rival."""
    dtype, config, device = DTYPES[options.dtype], make_config(options.variant, options.depth), options.device
    weights, captions = make_weights(config, dtype), make_captions(config, options.captions, dtype)
    side, ours = config.base_size * config.patch_size, OurLoop(config, weights, dtype, device).patcher
    rivals = {
        name: lambda model=model: sample(model, captions, side, options.steps)
        for name, model in turn_dials(ours).items()
    }
    rivals[FEW] = lambda: sample(ours, captions, side, options.lcm_steps, guidance=1.0)
    others = [DiffusersLoop] if config.base_px <= 256 else [HostLoop, DiffusersLoop]  # ComfyUI's own fails there
    for kind in others:
        loop = kind(config, weights, dtype, device)
        rivals[HOST if kind is HostLoop else DIFFUSERS] = lambda loop=loop: loop.sample(captions, side, options.steps)
    first = {}
    for name, run in rivals.items():
        began = time.perf_counter()
        run()
        first[name] = time.perf_counter() - began
    seconds = take_turns(rivals, options.rounds, options.clock, device, {})
    return {
        "case": {
            **{"variant": options.variant, "blocks": config.depth, "steps": options.steps, "dtype": options.dtype},
            **{"lcm_steps": options.lcm_steps, "captions": options.captions, "device": name_device(device)},
            **{"threads": torch.get_num_threads(), "clock": options.clock, "rounds": options.rounds},
        },
        "seconds": seconds,
        "first_s": first,
        "peak_bytes": {name: measure_peak(run, device) for name, run in rivals.items()},
        "ratios": {
            name: {other: compare(seconds, name, other) for other in (EXACT, HOST, DIFFUSERS) if other in seconds}
            for name in rivals
        },
    }


def publish(runs, folder):
    """Add runs to ways.json and write ways.md again. Returns its text."""
    text = (
        "One picture, its prompt and negative of so many tokens, time over others' (in brackets: least to greatest):\n"
    )
    for run in keep_runs(folder / "ways.json", runs):
        case, rows = run["case"], []
        for name, taken in run["seconds"].items():
            ratios = (describe_ratio(run["ratios"][name].get(other)) for other in (EXACT, HOST, DIFFUSERS))
            memory = f"{run['peak_bytes'][name] / 2**20:.0f} MiB"
            rows.append([name, f"{statistics.median(taken):.3g} s", f"{run['first_s'][name]:.3g} s", memory, *ratios])
        text += f"\n{case['variant']}, {case['blocks']} blocks, {case['steps']} steps ({case['lcm_steps']} as LCM), "
        text += f"{case['captions']} tokens, {case['dtype']}, {case['device']}, {case['threads']} threads, "
        text += f"{case['clock']} time, {case['rounds']} rounds:\n\n"
        head = ["way", "a picture", "the first", "beside the weights", "over exact"]
        text += markdown_table([*head, f"over {HOST}'s own", f"over {DIFFUSERS}"], rows)
    (folder / "ways.md").write_text(text, encoding="utf-8")
    return text
