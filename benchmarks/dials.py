"""The dials: how much of our own exact loop's time they take, and what they change.

On the demo model, PSNR is of the decoded pictures against the exact loop's, the median over captions and the lowest
tenth; accuracy is the share of right attributes. With `--variant`, on random weights of full width, PSNR is of the
latents, and there is nothing to read back. Blocks that ran are counted too.
"""

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..demo.evaluate import held_out_scenes
from ..demo.scenes import caption
from ..demo.scorer import ATTRIBUTES, add_scores, score
from ..demo.train import DENOISER_FILE, TEXT_FILE, VAE_FILE
from .cases import name_device, parse_run
from .host import import_host
from .peers import make_captions, make_config, make_weights
from .report import RESULTS, markdown_table
from .timing import compare, read_clock

SIDE_PX, LARGE_PX, STEPS, GUIDANCE = 128, 256, 20, 4.0
EXACT = "exact"
CACHES = ((0.15, 3), (0.3, 3), (0.5, 2), (0.5, 3), (0.8, 4))  # threshold, most reuses
INTERVALS = ((0.0, 0.5), (0.0, 0.7), (0.2, 1.0), (0.3, 1.0), (0.4, 1.0), (0.3, 0.7))
COMPRESSIONS = (
    (2, "every other", 0.0),
    (2, "later half", 0.0),
    (2, "all", 0.0),
    (2, "all", 0.3),
    (4, "every other", 0.0),
)
TOKENS = (40, 1)  # of the positive and the negative caption on random weights
TABLE_SCALE = 25.0  # random weights are N(0, 0.02); with tables of half a unit every block counts

logger = logging.getLogger(__name__)


@dataclass
class Studio:
    """What is drawn. decode: latents -> what PSNR is of. accuracy: of decoded pictures, in per cent, or None."""

    model: object
    positive: list
    negative: list
    latent: torch.Tensor
    steps: int
    decode: Callable
    accuracy: Callable

    def draw(self, model, clock):
        """(seconds, what was decoded)."""
        from comfy import sample

        from ..nodes.host.denoiser import sampling

        sampler, sigmas = (
            sampling.make_sampler("dpm_solver"),
            sampling.make_sigmas("uniform", self.steps, model=self.model),
        )
        noise = sample.prepare_noise(self.latent, 3)
        with torch.inference_mode():
            began = read_clock(clock, "cpu")  # the host hands the latent over in the computer's memory, so it is done
            result = sample.sample_custom(
                model, noise, GUIDANCE, sampler, sigmas, self.positive, self.negative, self.latent,
                disable_pbar=True, seed=3,
            )  # fmt: skip
            return read_clock(clock, "cpu") - began, self.decode(result)


def demo_studio(count, side_px):
    """The demo model and captions that it never saw."""
    from ..nodes.host import loading
    from ..nodes.host.text import captions, t5

    model, vae = loading.load_patcher(DENOISER_FILE), loading.read_vae(VAE_FILE)
    scenes = held_out_scenes(count, side_px, side_px)
    clip, length = t5.load_t5(TEXT_FILE), model.model.pixart_config.caption_length
    positive, _ = captions.encode_captions(clip, [caption(scene) for scene in scenes], length)
    negative, _ = captions.encode_captions(clip, [""], length)

    def accuracy(pictures):
        drawn = (pictures * 255).round().byte().numpy()
        shares = add_scores(score(np.asarray(p), s) for p, s in zip(drawn, scenes, strict=True))
        return 100 * sum(shares[name] for name in ATTRIBUTES) / len(ATTRIBUTES)

    latent = torch.zeros(count, 4, side_px // 8, side_px // 8)
    return Studio(model, positive, negative, latent, STEPS, lambda x: vae.decode(x).clamp(0, 1), accuracy)


def random_studio(variant, depth, side_px, steps):
    """A released size with random weights."""
    from ..nodes.host.denoiser import model

    config = make_config(variant, depth)
    weights = make_weights(config, torch.float32)
    weights = {name: w * TABLE_SCALE if name.endswith("scale_shift_table") else w for name, w in weights.items()}
    patcher = model.make_patcher(weights, config, torch.float32)
    captions = ([[states, {"pooled_output": None}]] for states in make_captions(config, TOKENS, torch.float32))
    latent = torch.zeros(1, 4, side_px // 8, side_px // 8)
    return Studio(patcher, *captions, latent, steps, lambda x: x / (x.amax() - x.amin()), lambda _: None)


def small_settings(model):
    """(label, MODEL) of the settings for pictures of any size."""
    from ..nodes.host.denoiser.acceleration import cache_blocks, limit_guidance

    for threshold, most in CACHES:
        yield f"block cache {threshold:g}, at most {most} reuses", cache_blocks(model, threshold, 1, 0, 0.1, 1.0, most)
    for start, end in INTERVALS:
        yield f"guidance from {start:.0%} to {end:.0%}", limit_guidance(model, start, end)
    both = limit_guidance(cache_blocks(model, 0.5, 1, 0, 0.1, 1.0, 2), 0.2, 1.0)
    yield "block cache 0.5, at most 2 reuses, and guidance from 20% to 100%", both


def large_settings(model):
    """(label, MODEL) of the settings for large pictures."""
    from ..nodes.host.denoiser.acceleration import compress_attention

    for factor, blocks, start in COMPRESSIONS:
        label = f"KV compression by {factor}, {blocks}" + (f", from {start:.0%}" if start else "")
        yield label, compress_attention(model, factor, blocks, start, 1.0)


def measure(studio, settings, rounds, clock):
    """A row of figures for every setting, each drawn in turns with the exact loop, which is the first row."""
    ran = []
    for block in studio.model.model.diffusion_model.blocks:
        block.register_forward_hook(lambda _, given, __: ran.append(given[0].shape[0]))
    studio.draw(studio.model, clock)  # warms up
    whole, (_, exact) = sum(ran), studio.draw(studio.model, clock)
    rows = [{"setting": EXACT, "time": 1.0, "blocks": 1.0, "psnr_db": None, "accuracy": studio.accuracy(exact)}]
    for label, model in settings:
        seconds: dict[str, list[float]] = {EXACT: [], label: []}
        for _ in range(rounds):
            seconds[EXACT].append(studio.draw(studio.model, clock)[0])
            ran.clear()
            taken_s, found = studio.draw(model, clock)
            seconds[label].append(taken_s)
        psnr, times = compare_pictures(found, exact), compare(seconds, label, EXACT)
        rows.append(
            {
                "setting": label,
                "time": times["ratio"],
                "time_range": [times["least"], times["greatest"]],
                "blocks": sum(ran) / whole,
                "psnr_db": psnr.median().item(),
                "psnr_low_db": psnr.quantile(0.1).item(),
                "accuracy": studio.accuracy(found),
            }
        )
        logger.info("%s", rows[-1])
    return rows


def compare_pictures(found, exact):
    """PSNR of each picture in dB, (B,), for a range of 1; 100 where they are alike."""
    errors = (found - exact).square().flatten(1).mean(1).clamp_min(1e-10)
    return -10 * errors.log10()


def make_table(rows):
    """The rows as Markdown."""
    cells = []
    for row in rows:
        psnr = "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} ({row['psnr_low_db']:.1f}) dB"
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.1f} %"
        cells.append([row["setting"], f"{row['time']:.2f}", f"{row['blocks']:.2f}", psnr, accuracy])
    return markdown_table(["setting", "time", "blocks run", "PSNR (lowest tenth)", "right attributes"], cells)


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks dials", description=__doc__)
    parser.add_argument("--count", type=int, default=24, help="captions")
    parser.add_argument("--count-large", type=int, default=8, help=f"captions at {LARGE_PX} px")
    parser.add_argument("--variant", help="measure random weights of this variant instead")
    parser.add_argument("--depth", type=int, default=0, help="blocks of the variant (default: all)")
    parser.add_argument("--side-px", type=int, default=256, help="size of the variant's pictures")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the variant")
    parser.add_argument("--compression", action="store_true", help="the variant's KV compression, not the other dials")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parse_run(parser, arguments)


def main(arguments):
    """Run the benchmark and write results/dials.json and .md, or dials_<variant>.*."""
    options = parse(arguments)
    import_host(options.device)
    turns, name = {"rounds": options.rounds, "clock": options.clock}, "dials"
    where = f"{torch.get_num_threads()} threads" if options.device == "cpu" else name_device(options.device)
    how = f"over the exact loop, {where}, {options.clock} time, {options.rounds} rounds"
    results = {}
    if options.variant:
        studio = random_studio(options.variant, options.depth, options.side_px, options.steps)
        settings = large_settings if options.compression else small_settings
        name += f"_{options.variant}_{options.side_px}px{'_compression' if options.compression else ''}"
        label = f"{options.steps} guided steps at {options.side_px} px, random weights of {options.variant}, "
        label += f"{options.depth or 'all'} blocks, {how}"
        results[label] = measure(studio, settings(studio.model), **turns)
    else:
        for side_px, count, settings in (
            (SIDE_PX, options.count, small_settings),
            (LARGE_PX, options.count_large, large_settings),
        ):
            studio = demo_studio(count, side_px)
            label = f"{STEPS} guided steps at {side_px} px, {count} captions, {how}"
            results[label] = measure(studio, settings(studio.model), **turns)
    text = "\n".join(f"{label}:\n\n{make_table(rows)}" for label, rows in results.items())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.out / f"{name}.md").write_text(text, encoding="utf-8")
    logger.info("%s", text)


if __name__ == "__main__":
    main(None)
