"""How well the demo model obeys its captions, by sampler and number of steps, through ComfyUI's own sampling.

The captions are of scenes never drawn in training; the score is the mean share of right backgrounds, colours, positions
and shapes. LCM and DMD are left out: they are for distilled weights.
"""

import argparse
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..demo.evaluate import held_out_scenes
from ..demo.scenes import caption
from ..demo.scorer import ATTRIBUTES, add_scores, score
from ..demo.train import DENOISER_FILE, TEXT_FILE, VAE_FILE
from .cases import add_device
from .host import import_host
from .report import RESULTS, markdown_table, save_plot

STEPS = (2, 4, 6, 8, 10, 14, 20, 30, 50)
SIDE_PX = 128
GUIDANCE = 4.0
BATCH = 25

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contender:
    """One row: a sampler with its options on a schedule of ours. host: it is one of ComfyUI's own."""

    sampler: str
    schedule: str = "uniform"
    options: dict = field(default_factory=dict)
    host: bool = False


CONTENDERS = {
    "SA-Solver (official)": Contender("sa_solver", options={"few_steps": True}),
    "SA-Solver": Contender("sa_solver"),
    "SA-Solver, kl_optimal times": Contender("sa_solver", "kl_optimal"),
    "SA-Solver, tau 0": Contender("sa_solver", options={"tau": 0.0}),
    "DPM-Solver++ 2": Contender("dpm_solver"),
    "DPM-Solver++ 3": Contender("dpm_solver", options={"order": 3}),
    "IDDPM": Contender("iddpm", "iddpm"),
    "DDIM": Contender("ddim"),
    "ComfyUI dpmpp_2m": Contender("dpmpp_2m", host=True),
    "ComfyUI sa_solver": Contender("sa_solver", host=True),
}


class Studio:
    """The demo model in this process's ComfyUI, and the scenes that it has to draw."""

    def __init__(self, count):
        import_host()
        from comfy import sample, samplers

        from ..nodes.host import loading
        from ..nodes.host.denoiser import sampling
        from ..nodes.host.text import captions, t5

        self.sample_custom, self.prepare_noise = sample.sample_custom, sample.prepare_noise
        self.samplers, self.sampling = samplers, sampling
        self.model = loading.load_patcher(DENOISER_FILE)
        self.vae = loading.read_vae(VAE_FILE)
        clip = t5.load_t5(TEXT_FILE)
        self.scenes = held_out_scenes(count, SIDE_PX, SIDE_PX)
        length = self.model.model.pixart_config.caption_length
        self.batches = [
            captions.encode_captions(clip, [caption(scene) for scene in self.scenes[i : i + BATCH]], length)[0]
            for i in range(0, count, BATCH)
        ]
        self.negative, _ = captions.encode_captions(clip, [""], length)

    def accuracy(self, contender, steps):
        """The mean share of right attributes over all scenes."""
        make = self.samplers.sampler_object if contender.host else self.sampling.make_sampler
        sampler = make(contender.sampler, **contender.options)
        sigmas = self.sampling.make_sigmas(contender.schedule, steps, model=self.model)
        pictures = []
        for seed, positive in enumerate(self.batches):
            latent = torch.zeros(positive[0][0].shape[0], 4, SIDE_PX // 8, SIDE_PX // 8)
            noise = self.prepare_noise(latent, seed)
            with torch.inference_mode():
                latent = self.sample_custom(
                    self.model, noise, GUIDANCE, sampler, sigmas, positive, self.negative, latent,
                    disable_pbar=True, seed=seed,
                )  # fmt: skip
                pictures.extend((self.vae.decode(latent) * 255).round().byte().numpy())
        shares = add_scores(score(np.asarray(p), s) for p, s in zip(pictures, self.scenes, strict=True))
        return sum(shares[name] for name in ATTRIBUTES) / len(ATTRIBUTES)


def main(arguments):
    """Run the benchmark and write results/captions.json, .md and .svg."""
    parser = argparse.ArgumentParser(prog="benchmarks captions", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="captions")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    add_device(parser)
    options = parser.parse_args(arguments)
    import_host(options.device)
    studio, runs = Studio(options.count), {}
    for label, contender in tqdm(CONTENDERS.items()):
        runs[label] = [100.0 * studio.accuracy(contender, steps) for steps in options.steps]
        text = save_results(runs, options.count, options.steps, options.out)
    logger.info("%s", text)


def save_results(runs, count, steps, folder):
    """Write the numbers, their table and their plot, also of a part of the runs. Returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    table = markdown_table(["sampler", *steps], [[k, *(f"{v:.1f}" for v in row)] for k, row in runs.items()])
    text = f"Right attributes in {count} captions, per cent, by steps (guidance {GUIDANCE:g}):\n\n{table}"
    numbers = {"captions": count, "steps": steps, "runs": runs}
    (folder / "captions.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    (folder / "captions.md").write_text(text, encoding="utf-8")
    curves = {label: (steps, row, {"linestyle": "--"} if CONTENDERS[label].host else {}) for label, row in runs.items()}
    title = "The demo model's obedience"
    save_plot(folder / "captions.svg", curves, title, "steps", "right attributes, %", logarithmic=("x",))
    return text
