"""What a ControlNet costs: one controlled step against one without, at XL/2 with random weights, in ComfyUI.

Runs alternate and medians are compared, so that a busy machine slows both alike. The second step of two is timed: the
first also encodes the control image. Memory is what a controlled run needs at its peak beyond the other, weights apart.
"""

import argparse
import json
import logging
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from ..demo.train import VAE_FILE
from ..pixart.checkpoint import expected_shapes
from ..pixart.config import CONFIGS
from ..pixart.weights.controlnets import ControlNetCheckpoint, expected_control_shapes
from .cases import DTYPES, name_device, parse_run
from .host import import_host
from .peaks import PeakMemory
from .report import RESULTS, markdown_table
from .timing import read_clock

VARIANT = "alpha-512"
MAX_RATIO = 1.55
MAX_EXTRA_MEMORY = 0.1  # of the control's weights
CAPTION_TOKENS = 40

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One sampling: seconds of its second step, and the peak of memory in bytes."""

    step_s: float
    peak: int


class Studio:
    """XL/2 and its ControlNet with random weights in this process's ComfyUI."""

    def __init__(self, copies, side_px, dtype, clock, device):
        import_host(device)
        from comfy import sample

        from ..nodes.host import controlnet, loading
        from ..nodes.host.denoiser import model

        config = CONFIGS[VARIANT]
        shapes = expected_shapes(config)
        self.sample, self.dtype, self.clock, self.device = sample, dtype, clock, device
        self.model = model.make_patcher({name: _random(s, dtype) for name, s in shapes.items()}, config, dtype)
        weights = {f"controlnet.{n}": _random(s, dtype) for n, s in expected_control_shapes(config, copies).items()}
        self.control_bytes = sum(tensor.nbytes for tensor in weights.values())
        checkpoint = ControlNetCheckpoint(Path("random"), weights, config, copies, "alpha", None)
        control = controlnet.make_control(checkpoint, dtype)
        self.latent = torch.zeros(1, 4, side_px // 8, side_px // 8)
        self.plain = [[torch.randn(1, CAPTION_TOKENS, config.caption_channels), {}]]
        hint = torch.rand(1, side_px, side_px, 3)
        vae = loading.read_vae(VAE_FILE)
        self.controlled = controlnet.apply_control(self.plain, self.plain, control, hint, vae, 1.0, 0.0, 1.0)[0]

    def run(self, conditioning) -> Run:
        """Two steps of Euler without guidance."""
        ends, memory = [], PeakMemory(self.device)
        memory.reset()
        noise = self.sample.prepare_noise(self.latent, 1)
        with torch.inference_mode():
            self.sample.sample(
                self.model, noise, 2, 1.0, "euler", "simple", conditioning, conditioning, self.latent,
                disable_pbar=True, callback=lambda *_: ends.append(read_clock(self.clock, self.device)),
            )  # fmt: skip
        return Run(ends[1] - ends[0], memory.read())


def main(arguments):
    """Run the benchmark and write results/controlnet.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks controlnet", description=__doc__)
    parser.add_argument("--copies", type=int, default=13, help="copied blocks, of 28")
    parser.add_argument("--side-px", type=int, default=512, help="side of the picture")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parse_run(parser, arguments, rounds=5)
    on_gpu = options.device == "cuda"
    dtype = DTYPES[options.dtype or ("bf16" if on_gpu else "fp32")]
    studio = Studio(options.copies, options.side_px, dtype, options.clock, options.device)
    plain, controlled = [], []
    for number in range(options.rounds + 1):
        pair = studio.run(studio.plain), studio.run(studio.controlled)
        if number:  # the first warms up
            plain.append(pair[0])
            controlled.append(pair[1])
            logger.info("%.2f s, with control %.2f s", pair[0].step_s, pair[1].step_s)
    device = name_device(options.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    numbers = {
        "device": device,
        "dtype": str(studio.dtype).removeprefix("torch."),
        "side_px": options.side_px,
        "copies": options.copies,
        "clock": options.clock,
        "rounds": options.rounds,
        **_summary(plain, controlled, studio.control_bytes),
    }
    _publish(numbers, options.out)


def _summary(plain, controlled, control_bytes) -> dict:
    seconds = [statistics.median(run.step_s for run in runs) for runs in (plain, controlled)]
    ratios = sorted(two.step_s / one.step_s for one, two in zip(plain, controlled, strict=True))
    peaks = [statistics.median(run.peak for run in runs) for runs in (plain, controlled)]
    return {
        "step_s": seconds[0],
        "controlled_step_s": seconds[1],
        "ratio": statistics.median(ratios),
        "ratios": [ratios[0], ratios[-1]],
        "control_bytes": control_bytes,
        "extra_bytes": peaks[1] - peaks[0],
    }


def _publish(numbers, folder):
    extra, limit = numbers["extra_bytes"] / numbers["control_bytes"], f"at most {MAX_EXTRA_MEMORY:.0%}"
    low, high = numbers["ratios"]
    rows = [
        ["one step", f"{numbers['step_s']:.2f} s", ""],
        ["one step with control", f"{numbers['controlled_step_s']:.2f} s", ""],
        ["ratio (median of pairs)", f"{numbers['ratio']:.2f} ({low:.2f} to {high:.2f})", f"at most {MAX_RATIO}"],
        ["weights of the control", f"{numbers['control_bytes'] / 2**20:.0f} MiB", ""],
        ["further memory at the peak, of these", f"{extra:.1%}", limit],
    ]
    text = (
        f"PixArt-XL/2 at {numbers['side_px']} px, {numbers['copies']} of 28 blocks copied, {numbers['dtype']}, "
        f"{numbers['device']}, {numbers['clock']} time, "
        f"{numbers['rounds']} rounds:\n\n{markdown_table(['', 'measured', 'wanted'], rows)}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "controlnet.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    (folder / "controlnet.md").write_text(text, encoding="utf-8")
    logger.info("%s", text)


def _random(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 0.02
