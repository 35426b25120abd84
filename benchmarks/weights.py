"""What the precision of weights costs and gives in ComfyUI: time of a step, memory, and what it changes.

On random weights of full width, whose file is in bf16, a guided step in turns, and how far each of the blocks' linear
layers and the whole prediction are from float32; on the demo model, PSNR of the pictures from those in float32, and
the share of right attributes.
"""

import argparse
import logging
import re
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from ..demo.train import DENOISER_FILE
from .caches import compare_pictures
from .cases import name_device, parse_run
from .dials import SIDE_PX, demo_studio
from .host import import_host
from .peers import OurLoop, make_captions, make_config, make_weights
from .report import RESULTS, keep_runs, markdown_table
from .timing import take_turns

EXACT = "fp32"
_LAYER = re.compile(r"blocks\.\d+\.(attn\.(qkv|proj)|cross_attn\.(q_linear|kv_linear|proj)|mlp\.fc[12])")

logger = logging.getLogger(__name__)


def main(arguments):
    """Run the benchmark and write results/weights.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks weights", description=__doc__)
    parser.add_argument("--variant", default="alpha-256")
    parser.add_argument("--depth", type=int, default=4, help="blocks (0: all)")
    parser.add_argument("--captions", type=int, nargs=2, default=[40, 20], help="tokens of positive and negative")
    parser.add_argument("--scenes", type=int, default=16, help="captions of the demo model")
    parser.add_argument("--weight-dtypes", nargs="+", default=[EXACT, "bf16", "int8"], help="those of the loaders")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parse_run(parser, arguments)
    import_host(options.device)
    text = publish([measure(options)], options.out)
    logger.info("%s", text)


def measure(options) -> dict:
    """Seconds, bytes and distances of each precision. Raises KeyError for one that the loaders do not offer."""
    from ..nodes.host.loading import MODEL_DTYPES, load_patcher

    config = make_config(options.variant, options.depth)
    weights, names = make_weights(config, torch.bfloat16), dict.fromkeys([EXACT, *options.weight_dtypes])
    loops = {name: OurLoop(config, weights, MODEL_DTYPES[name], options.device) for name in names}
    captions, side = make_captions(config, options.captions, torch.float32), config.base_size * config.patch_size
    rows = _measure_steps(loops, captions, side, weights, options)
    studio, exact = demo_studio(options.scenes, SIDE_PX), None
    for name, row in rows.items():
        pictures = studio.draw(load_patcher(DENOISER_FILE, dtype=name), options.clock)[1]
        exact = pictures if exact is None else exact
        row |= {"accuracy": studio.accuracy(pictures)}
        row |= {} if name == EXACT else {"psnr_db": compare_pictures(pictures, exact).median().item()}
    return {
        "case": {
            **{"variant": options.variant, "blocks": config.depth, "captions": options.captions},
            **{"device": name_device(options.device), "threads": torch.get_num_threads(), "clock": options.clock},
            **{"rounds": options.rounds, "scenes": options.scenes},
        },
        "rows": rows,
    }


def _measure_steps(loops, captions, side, weights, options) -> dict[str, dict]:
    """A row for each model, with all of them in the midst of a sampling at once."""
    rows = {}

    def enter(left, predictors):
        if left:
            loops[left[0]].use_step(captions, side, lambda step: enter(left[1:], {**predictors, left[0]: step}))
            return
        seconds = take_turns(predictors, options.rounds, options.clock, options.device)
        exact = predictors[EXACT]().float()
        for name, predict in predictors.items():
            with _Distances(loops[name].patcher.model.diffusion_model, weights) as layers:
                found = predict().float()
            row = {"seconds": seconds[name], "weights_bytes": loops[name].patcher.model_size()}
            rows[name] = row | {"off": _distance(found, exact), "layers_off": layers.of_each}

    enter(list(loops), {})
    return rows


def _distance(found, expected) -> float:
    return ((found - expected).norm() / expected.norm()).item()


class _Distances:
    """Within it, how far the results of a network's linear layers are from float32, by the layers' names."""

    def __init__(self, network, weights):
        self.of_each: dict[str, float] = {}
        self._weights = weights
        self._hooks = [
            layer.register_forward_hook(lambda layer, given, result, name=name: self._compare(name, given[0], result))
            for name, layer in network.named_modules()
            if _LAYER.fullmatch(name)
        ]

    def _compare(self, name, given, result):
        weight, bias = (self._weights[f"{name}.{part}"].to(given.device).float() for part in ("weight", "bias"))
        exact = F.linear(given.float(), weight, bias)
        self.of_each[name] = _distance(result.float(), exact)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


def publish(runs, folder):
    """Add runs to weights.json and write weights.md again. Returns its text."""
    text = "A guided step by the precision of the weights; how far it and the blocks' linear layers are from float32:\n"
    for run in keep_runs(folder / "weights.json", runs):
        case, rows = run["case"], []
        for name, row in run["rows"].items():
            layers = row["layers_off"].values()
            spread = f"{min(layers):.2%} to {max(layers):.2%} ({len(layers)} layers)" if layers else ""
            psnr = f"{row['psnr_db']:.1f} dB" if "psnr_db" in row else ""
            time = f"{1000 * statistics.median(row['seconds']):.0f} ms"
            size = f"{row['weights_bytes'] / 2**20:.0f} MiB"
            rows.append([name, time, size, f"{row['off']:.2%}", spread, psnr, f"{row['accuracy']:.1f} %"])
        text += f"\n{case['variant']}, {case['blocks']} blocks, captions of {case['captions']} tokens, "
        text += f"{case['device']}, {case['threads']} threads, {case['clock']} time, {case['rounds']} rounds; "
        text += f"demo model: {case['scenes']} captions:\n\n"
        head = ["weight_dtype", "a step", "weights", "off", "a layer off", "demo, PSNR", "demo, right attributes"]
        text += markdown_table(head, rows)
    (folder / "weights.md").write_text(text, encoding="utf-8")
    return text
