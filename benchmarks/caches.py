"""Caches against each other: quality over the work that is left, ours, diffusers' hooks, and the package cache-dit.

All draw the same captions from the same noise with the same solver. Work is the share of the blocks' matrix products
that ran. On the demo model PSNR is of decoded pictures against the exact ones (the median over captions), and accuracy
is the share of right attributes; with `--variant` weights are random, and PSNR is of latents.
`pip install cache-dit` brings the last rival, else it is left out.
"""

import argparse
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from ..demo.train import DENOISER_FILE
from ..samplers import SAMPLERS
from ..samplers.schedules import schedule_sigmas, timesteps_from_sigmas
from .cases import parse_run
from .dials import GUIDANCE, SIDE_PX, compare_pictures, demo_studio, random_studio
from .host import import_host
from .peers import DiffusersLoop
from .report import RESULTS, markdown_table, save_plot
from .timing import read_clock

SEED = 3  # of dials.Studio
LEFT_OUT = ("cross_attn.kv_linear", "attn2.to_k", "attn2.to_v")  # of captions: we compute them once a run
OLD, FORECAST, INPUT = "first blocks", "first blocks, forecast", "input, forecast"
OURS = {
    OLD: ((0.3, 3), (0.5, 3), (0.8, 4)),
    FORECAST: ((0.3, 3), (0.5, 3), (0.8, 4)),
    INPUT: ((0.1, 3), (0.2, 3), (0.3, 4), (0.5, 6)),
}
FEWER = (0.7, 0.5, 0.35)  # of the steps
THRESHOLDS = (0.1, 0.2, 0.3, 0.5)
INTERVALS = (2, 3, 4, 5)
FULL_BLOCKS = [r"transformer_blocks\.\d+\.(attn1|attn2|ff)"]
logger = logging.getLogger(__name__)


class Work:
    """Counts the matrix products of a model's blocks, in multiplications."""

    def __init__(self, blocks):
        self.done = 0
        for name, module in blocks.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(LEFT_OUT):
                module.register_forward_hook(self._note)

    def _note(self, module, given, _):
        self.done += given[0].numel() * module.out_features


def our_settings(model):
    """(curve, label, MODEL) of our dials."""
    from ..nodes.host.denoiser.acceleration import cache_blocks, reuse_guidance

    for mode, dials in OURS.items():
        for threshold, most in dials:
            yield f"ours: {mode}", f"{threshold:g}, {most}", cache_blocks(model, threshold, 1, 0, 0.1, 1.0, most, mode)
    for every in (2, 3):
        yield "ours: guidance reuse", str(every), reuse_guidance(model, every, "as it was", 0.1, 1.0)[0]
    for threshold, most in OURS[INPUT][:3]:
        both = cache_blocks(model, threshold, 1, 0, 0.1, 1.0, most, INPUT)
        both = reuse_guidance(both, 2, "as it was", 0.1, 1.0)[0]
        yield f"ours: {INPUT}, and guidance reuse", f"{threshold:g}, {most}, 2", both


class Rival:
    """diffusers' transformer in the same loop, by the same solver."""

    def __init__(self, studio, weights, prepare: Callable):
        config = studio.model.model.pixart_config
        self.loop = DiffusersLoop(config, widen(weights, config.hidden_size), torch.float32)
        self.studio, self.work = studio, Work(self.loop.net.transformer_blocks)
        prepare(self.loop.net)
        states, masks = zip(*(self._caption(each[0]) for each in (studio.positive, studio.negative)), strict=True)
        longest = max(each.shape[1] for each in states)
        count = len(studio.latent)
        self.states = torch.cat([_pad(each, longest, 1).expand(count, -1, -1) for each in states])
        self.masks = torch.cat([_pad(each, longest, 0).expand(count, -1) for each in masks])

    @staticmethod
    def _caption(entry):
        states, extra = entry
        mask = extra.get("attention_mask")
        return states, torch.ones(states.shape[:2]) if mask is None else mask.reshape(len(states), -1).float()

    def draw(self, steps, clock):
        """(seconds, what was decoded)."""
        noise = torch.randn(self.studio.latent.shape, generator=torch.Generator().manual_seed(SEED))
        levels = schedule_sigmas("uniform", steps).float()

        def denoise(x, sigma, **_):
            time = timesteps_from_sigmas(sigma[:1]).float().expand(2 * len(x))
            told, untold = self.loop.predict((x / (1 + sigma[0] ** 2).sqrt()).repeat(2, 1, 1, 1), time, self.states,
                                             self.masks)[:, :4].chunk(2)  # fmt: skip
            return x - sigma[0] * (untold + GUIDANCE * (told - untold))

        began = read_clock(clock, "cpu")
        with torch.inference_mode():
            start = noise * (1 + levels[0] ** 2).sqrt()
            latent = SAMPLERS["dpm_solver"](denoise, start, levels, disable=True)
        latent = latent / self.studio.model.model.pixart_config.vae_scale
        return read_clock(clock, "cpu") - began, self.studio.decode(latent)


def widen(weights, hidden):
    """The same model with feed-forward layers four times as wide as the tokens, which diffusers has built in.

    What is added is naught: gelu(0) = 0.
    """
    found = dict(weights)
    for name, value in weights.items():
        missing = 4 * hidden - value.shape[-1 if name.endswith("fc2.weight") else 0]
        if name.endswith("mlp.fc2.weight"):
            found[name] = F.pad(value, (0, missing))
        elif name.endswith(("mlp.fc1.weight", "mlp.fc1.bias")) and "blocks." in name:
            found[name] = F.pad(value, (0, 0, 0, missing) if value.ndim == 2 else (0, missing))
    return found


def _pad(x, length, trailing):
    return F.pad(x, (*[0, 0] * trailing, 0, length - x.shape[1]))


def rivals(steps):
    """(curve, label, a function that prepares diffusers' transformer)."""
    yield "diffusers", "exact", lambda net: None
    for threshold in THRESHOLDS:
        yield "diffusers: FirstBlockCache", f"{threshold:g}", lambda net, t=threshold: _first_block(net, t)
    for interval in INTERVALS:
        yield "diffusers: TaylorSeerCache", f"every {interval}", lambda net, i=interval: _taylor(net, i)
    if importlib.util.find_spec("cache_dit"):
        for threshold in THRESHOLDS:
            for order in (0, 1):
                name = "cache-dit: DBCache" + (" with TaylorSeer" if order else "")
                yield name, f"{threshold:g}", lambda net, t=threshold, o=order: _cache_dit(net, t, o, steps)


def _first_block(net, threshold):
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(net, FirstBlockCacheConfig(threshold=threshold))
    _open_context(net)


def _taylor(net, interval):
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    settings = {"disable_cache_before_step": 3, "max_order": 1, "taylor_factors_dtype": torch.float32}
    apply_taylorseer_cache(
        net, TaylorSeerCacheConfig(cache_interval=interval, cache_identifiers=FULL_BLOCKS, **settings)
    )
    _open_context(net)


def _open_context(net):
    """What diffusers' pipelines do around each call, here once: both prompts go through in one batch."""
    from diffusers.models.cache_utils import CacheMixin

    net.opened = CacheMixin.cache_context(net, "both prompts")  # kept, since its end would clear the context
    net.opened.__enter__()


def _cache_dit(net, threshold, order, steps):
    import cache_dit

    adapter = cache_dit.BlockAdapter(
        transformer=net, blocks=net.transformer_blocks, forward_pattern=cache_dit.ForwardPattern.Pattern_3
    )
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, residual_diff_threshold=threshold, max_warmup_steps=2, num_inference_steps=steps
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if order else None
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)


def measure(studio, weights, clock):
    """A row for every setting; the first is our exact loop."""
    work = Work(studio.model.model.diffusion_model.blocks)
    whole_s, exact = studio.draw(studio.model, clock)
    whole, work.done = work.done, 0
    rows = []

    def add(curve, label, drawn, done):
        seconds, found = drawn
        psnr = compare_pictures(found, exact).median().item()
        row = {"curve": curve, "setting": label, "work": done / whole, "time": seconds / whole_s, "psnr_db": psnr}
        rows.append({**row, "accuracy": studio.accuracy(found)})
        logger.info("%s", rows[-1])

    add("ours", "exact", (whole_s, exact), whole)
    for curve, label, model in our_settings(studio.model):
        work.done = 0
        add(curve, label, studio.draw(model, clock), work.done)
    steps = studio.steps
    for share in FEWER:
        studio.steps, work.done = round(share * steps), 0
        add("ours: fewer steps", str(studio.steps), studio.draw(studio.model, clock), work.done)
    studio.steps = steps
    whole = None
    for curve, label, prepare in rivals(steps):
        rival = Rival(studio, weights, prepare)
        drawn = rival.draw(steps, clock)
        whole = whole or rival.work.done  # its own, since its layers may be wider
        add(curve, label, drawn, rival.work.done)
    return rows


def make_table(rows):
    """The rows as Markdown."""
    cells = [
        [
            *(row["curve"], row["setting"], f"{row['work']:.2f}", f"{row['time']:.2f}", f"{row['psnr_db']:.1f} dB"),
            "" if row["accuracy"] is None else f"{row['accuracy']:.1f} %",
        ]
        for row in rows
    ]
    return markdown_table(["cache", "setting", "work", "time", "PSNR", "right attributes"], cells)


def plot(path, rows, title):
    """PSNR over work, a curve for each cache."""
    curves: dict[str, tuple] = {}
    for row in sorted(rows, key=lambda row: row["work"]):
        if row["setting"] != "exact":
            x, y, _ = curves.setdefault(row["curve"], ([], [], {}))
            x.append(row["work"])
            y.append(row["psnr_db"])
    ticks = [tenth / 10 for tenth in range(1, 10)]
    save_plot(path, curves, title, "matrix products of the blocks that ran", "PSNR from exact, dB", (), ticks)


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks caches", description=__doc__)
    parser.add_argument("--count", type=int, default=12, help="captions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--variant", help="measure random weights of this variant instead")
    parser.add_argument("--depth", type=int, default=0, help="blocks of the variant (default: all)")
    parser.add_argument("--side-px", type=int, default=SIDE_PX)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parse_run(parser, arguments)


def main(arguments):
    """Run the benchmark and write results/caches_<model>_<steps>.json, .md and .svg."""
    options = parse(arguments)
    import_host(options.device)
    if options.variant:
        studio = random_studio(options.variant, options.depth, options.side_px, options.steps)
        weights = {name: value.clone() for name, value in studio.model.model.diffusion_model.state_dict().items()}
        weights = {name.removesuffix(".weight") if _is_table(name) else name: w for name, w in weights.items()}
    else:
        studio = demo_studio(options.count, options.side_px)
        studio.steps = options.steps
        weights = {name: value.float() for name, value in load_file(DENOISER_FILE).items()}
    rows = measure(studio, weights, options.clock)
    what = f"random {options.variant}" if options.variant else f"demo, {options.count} captions"
    title = f"{what}, {options.steps} guided steps of dpm_solver at {options.side_px} px"
    stem = f"caches_{options.variant or 'demo'}_{options.steps}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{stem}.json").write_text(json.dumps({title: rows}, indent=1) + "\n", encoding="utf-8")
    (options.out / f"{stem}.md").write_text(f"{title}:\n\n{make_table(rows)}", encoding="utf-8")
    plot(options.out / f"{stem}.svg", rows, title)
    logger.info("%s", make_table(rows))


def _is_table(name):
    return name.endswith(("scale_shift_table.weight", "y_embedding.weight"))


if __name__ == "__main__":
    main(None)
