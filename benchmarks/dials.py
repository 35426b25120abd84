"""The dials on the demo model: how much of our own exact loop's time they take, and what they change.

PSNR is of the decoded pictures against the exact loop's, the median over captions; accuracy is the share of right
attributes. Blocks that ran are counted too, since a model of four blocks saves less than XL/2 with its 28.
"""

import argparse
import json
import logging
import statistics
from pathlib import Path

import numpy as np
import torch

from ..demo.evaluate import held_out_scenes
from ..demo.scenes import caption
from ..demo.scorer import ATTRIBUTES, add_scores, score
from ..demo.train import DENOISER_FILE, TEXT_FILE, VAE_FILE
from .host import import_host
from .report import RESULTS, markdown_table
from .timing import read_clock

SIDE_PX, STEPS, GUIDANCE = 128, 20, 4.0
EXACT = "exact"

logger = logging.getLogger(__name__)


class Studio:
    """The demo model in this process's ComfyUI, and the captions that it has to draw."""

    def __init__(self, count):
        import_host()
        from comfy import sample

        from ..nodes.host import acceleration, loading, sampling, t5, text

        self.host, self.acceleration = sample, acceleration
        self.model, self.vae = loading.load_patcher(DENOISER_FILE), loading.read_vae(VAE_FILE)
        self.sampler = sampling.make_sampler("dpm_solver")
        self.sigmas = sampling.make_sigmas("uniform", STEPS, model=self.model)
        self.scenes = held_out_scenes(count, SIDE_PX, SIDE_PX)
        clip, length = t5.load_t5(TEXT_FILE), self.model.model.pixart_config.caption_length
        self.positive, _ = text.encode_captions(clip, [caption(scene) for scene in self.scenes], length)
        self.negative, _ = text.encode_captions(clip, [""], length)

    def settings(self):
        """(label, MODEL) of every setting; the exact one first."""
        yield EXACT, self.model
        for threshold in (0.2, 0.3, 0.5, 0.8):
            for most in (2, 4):
                model = self.acceleration.cache_blocks(self.model, threshold, 1, 0, 0.1, 1.0, most)
                yield f"block cache {threshold:g}, at most {most} reuses", model
        for end in (0.5, 0.7):
            yield f"guidance up to {end:.0%}", self.acceleration.limit_guidance(self.model, 0.0, end)

    def draw(self, model):
        """(seconds, pictures as (B, H, W, 3) floats in [0, 1])."""
        latent = torch.zeros(len(self.scenes), 4, SIDE_PX // 8, SIDE_PX // 8)
        noise = self.host.prepare_noise(latent, 3)
        with torch.inference_mode():
            began = read_clock("cpu", "cpu")
            result = self.host.sample_custom(
                model, noise, GUIDANCE, self.sampler, self.sigmas, self.positive, self.negative, latent,
                disable_pbar=True, seed=3,
            )  # fmt: skip
            seconds = read_clock("cpu", "cpu") - began
            return seconds, self.vae.decode(result).clamp(0, 1)

    def accuracy(self, pictures):
        """The mean share of right attributes, in per cent."""
        drawn = (pictures * 255).round().byte().numpy()
        shares = add_scores(score(np.asarray(p), s) for p, s in zip(drawn, self.scenes, strict=True))
        return 100 * sum(shares[name] for name in ATTRIBUTES) / len(ATTRIBUTES)


def main(arguments):
    """Run the benchmark and write results/dials.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks dials", description=__doc__)
    parser.add_argument("--count", type=int, default=24, help="captions")
    parser.add_argument("--threads", type=int, default=0, help="default: PyTorch's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    studio = Studio(options.count)
    ran = []
    for block in studio.model.model.diffusion_model.blocks:
        block.register_forward_hook(lambda _, given, __: ran.append(given[0].shape[0]))
    studio.draw(studio.model)
    results, exact = [], None
    for label, model in studio.settings():
        ran.clear()
        seconds, pictures = studio.draw(model)
        exact = exact or (seconds, pictures, sum(ran))
        errors = (pictures - exact[1]).square().flatten(1).mean(1).clamp_min(1e-10)
        psnr = statistics.median((-10 * errors.log10()).tolist())
        row = {"setting": label, "time": seconds / exact[0], "blocks": sum(ran) / exact[2], "psnr_db": psnr}
        results.append({**row, "accuracy": studio.accuracy(pictures)})
        logger.info("%s", results[-1])
    rows = [
        [r["setting"], f"{r['time']:.2f}", f"{r['blocks']:.2f}", f"{r['psnr_db']:.1f} dB", f"{r['accuracy']:.1f} %"]
        for r in results
    ]
    table = markdown_table(["setting", "time", "blocks run", "PSNR", "right attributes"], rows)
    text = f"{STEPS} guided steps at {SIDE_PX} px, {options.count} captions, over the exact loop:\n\n{table}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "dials.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.out / "dials.md").write_text(text, encoding="utf-8")
    logger.info("%s", text)


if __name__ == "__main__":
    main(None)
