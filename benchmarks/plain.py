"""Speed and memory of the model alone, without ComfyUI: `python benchmarks/plain.py --device cuda --dtypes bf16`.

Needs torch, numpy and safetensors beside `pixart/` and `samplers/`. Weights are random. Beside each figure
stands the roofline: the least time by the operations and bytes counted and the rates measured on this machine. Where
diffusers is installed, its transformer runs in turns with ours, on the same weights.
"""

import argparse
import importlib.util
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

PACK = "pixart_pack"  # as what this script imports the repository, whatever its folder is called


def _find_pack() -> str:
    """The name of the package over the repository's root. For a script there is none, so it is made."""
    if __package__:
        return __package__.rpartition(".")[0]
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]  # its files hide no library
    spec = importlib.util.spec_from_file_location(
        PACK, here.parent / "__init__.py", submodule_search_locations=[str(here.parent)]
    )
    sys.modules[PACK] = importlib.util.module_from_spec(spec)
    return PACK


_NAME = _find_pack()
pixart, pixart_config, samplers, schedules = (
    importlib.import_module(f"{_NAME}.{name}") for name in ("pixart", "pixart.config", "samplers", "samplers.schedules")
)
cases, peaks, peers, timing = (
    importlib.import_module(f"{_NAME}.benchmarks.{name}") for name in ("cases", "peaks", "peers", "timing")
)
CONFIGS, OURS, DIFFUSERS = pixart.CONFIGS, peers.OURS, peers.DIFFUSERS

logger = logging.getLogger(__name__)


class Race(NamedTuple):
    """What is timed: a function for each rival, and the operations and bytes that the model needs for the same."""

    rivals: dict[str, Callable]
    operations: float
    bytes_moved: float


class Track:
    """Both models with the same random weights on one device.

    compiled: with torch.compile. alone: without diffusers, even where it is installed.
    """

    def __init__(self, config, dtype, device, compiled=False, alone=False):
        self.config, self.dtype, self.device = config, dtype, device
        self.model = pixart.PixArt(config, dtype=dtype, device=device).eval().requires_grad_(False)
        torch.manual_seed(0)
        for parameter in self.model.parameters():
            parameter.normal_(std=0.02)
        self.runner = torch.compile(self.model) if compiled else self.model
        self.theirs = None
        if not alone and importlib.util.find_spec("diffusers"):
            self.theirs = peers.DiffusersLoop(config, self.model.state_dict(), dtype, device)
            if compiled:
                self.theirs.compile()

    def forward(self, case) -> Race:
        """One forward pass. Our caption is projected before, as at every step but the first."""
        captions = peers.make_captions(self.config, case.lengths, self.dtype)
        states, mask = self.join(captions)
        caption, latent = (
            self.model.project_caption(states),
            self.noise(case).repeat(case.batch, 1, 1, 1).to(self.dtype),
        )
        time = torch.full((case.batch,), float(peers.TIMESTEP), device=self.device)
        rivals = {OURS: lambda: self.runner(latent, time, caption, mask)}
        if self.theirs is not None:
            given = (latent, time.long(), *self.theirs.pad(captions))
            rivals[DIFFUSERS] = lambda: self.theirs.predict(*given)
        return Race(rivals, *self.count(case, case.batch, 1))

    def guided(self, case, steps) -> Race:
        """So many guided steps of one picture, its prompt as long as the case's longest, the negative a token."""
        captions = peers.make_captions(self.config, (max(case.lengths), 1), self.dtype)
        rivals = {OURS: self.loop("dpm_solver", "uniform", steps, captions, self.noise(case))}
        if self.theirs is not None:
            rivals[DIFFUSERS] = lambda: self.theirs.sample(
                captions, case.side_px // pixart_config.LATENT_DOWNSCALE, steps
            )
        return Race(rivals, *self.count(case, len(captions), steps))

    def distilled(self, case, steps) -> Race:
        """So many steps of LCM, which takes no guidance."""
        captions = peers.make_captions(self.config, (max(case.lengths),), self.dtype)
        return Race({OURS: self.loop("lcm", "lcm", steps, captions, self.noise(case))}, *self.count(case, 1, steps))

    def noise(self, case):
        """Of one picture: (1, C, H, W)."""
        sides = [case.side_px // pixart_config.LATENT_DOWNSCALE] * 2
        return torch.randn(1, self.config.in_channels, *sides, device=self.device)

    def count(self, case, batch, steps):
        """(operations, bytes) of so many forward passes."""
        itemsize, longest = self.dtype.itemsize, max(case.lengths)
        return (steps * work for work in timing.count_work(self.config, batch, case.tokens, longest, itemsize))

    def join(self, captions):
        """(captions in one batch, their mask or None), on the device."""
        lengths = [caption.shape[1] for caption in captions]
        longest = max(lengths)
        padded = [
            F.pad(caption, (0, 0, 0, longest - length)) for caption, length in zip(captions, lengths, strict=True)
        ]
        mask = (
            (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(self.device) if len(set(lengths)) > 1 else None
        )
        return torch.cat(padded).to(self.device), mask

    def loop(self, sampler, schedule, steps, captions, noise) -> Callable:
        """A function that samples so many steps, guided where there is a second caption."""
        states, mask = self.join(captions)
        levels = schedules.schedule_sigmas(schedule, steps).tolist()
        table = schedules.sigmas(torch.arange(schedules.NUM_TIMESTEPS)).to(self.device, torch.float32)
        options = {"noise_device": "gpu"} if sampler == "lcm" else {}

        def run():
            caption = self.model.project_caption(states)

            def denoise(x, sigma):
                time = torch.searchsorted(table, sigma).clamp(max=len(table) - 1).float()
                sigma = sigma.view(-1, 1, 1, 1)
                scaled = (x / (1 + sigma.square()).sqrt()).to(self.dtype).repeat(len(captions), 1, 1, 1)
                found = self.runner(scaled, time.repeat(len(captions)), caption, mask)[:, : x.shape[1]].float()
                told, *untold = found.chunk(len(captions))
                return x - sigma * (untold[0] + peers.GUIDANCE * (told - untold[0]) if untold else told)

            return samplers.SAMPLERS[sampler](denoise, noise * levels[0], levels, disable=True, **options)

        return run


def main(arguments=None):
    """Print the seconds of every case beside its roofline, and write them as JSON where --out says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=CONFIGS, default="sigma-512")
    cases.add_options(parser, dtypes=["fp32"])
    parser.add_argument("--steps", type=int, default=20, help="of a guided loop of the first case; 0 for none")
    parser.add_argument("--lcm-steps", type=int, default=4, help="of an LCM loop of the first case; 0 for none")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--alone", action="store_true", help="without diffusers, even where it is installed")
    parser.add_argument("--check", action="store_true", help="first hold what the device computes to the CPU's float32")
    parser.add_argument("--budget-s", type=float, default=480, help="seconds in all (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = cases.parse_run(parser, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.ends = time.monotonic() + options.budget_s
    if options.check:
        check(options)
    with torch.inference_mode():
        results = [result for dtype in options.dtypes for result in measure(dtype, options)]
    if options.out:
        told = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        del told["ends"]
        told["device"] = cases.name_device(options.device)
        options.out.write_text(json.dumps({"options": told, "cases": results}, indent=1) + "\n", encoding="utf-8")


def has_time(options, label) -> bool:
    """Whether there is time for something more; says it where there is none."""
    if time.monotonic() < options.ends:
        return True
    logger.info("%s: no time was left", label)
    return False


def check(options):
    """Log each finding of the checks against the CPU. Raises RuntimeError when one is not right."""
    correctness, parts = (
        importlib.import_module(f"{_NAME}.benchmarks.gpu.{name}") for name in ("correctness", "parts")
    )
    wrong = []
    for name, find in correctness.list_checks(options.device, is_small=False).items():
        for each in find() if has_time(options, name) else ():
            logger.info("%s", parts.describe(each))
            wrong += [] if each.is_right else [each.name]
    if wrong:
        raise RuntimeError(f"The device computes otherwise than the CPU: got {', '.join(wrong)}. See the lines above.")


def measure(dtype, options):
    """Yields seconds, memory and roofline of every case of a dtype."""
    best = timing.measure_roofline(options.device, cases.DTYPES[dtype], options.clock)
    logger.info("%s, at best: %.3g operations/s, %.3g bytes/s", dtype, best.operations, best.bandwidth)
    track = Track(
        peers.make_config(options.variant, options.depth),
        cases.DTYPES[dtype],
        options.device,
        options.compile,
        options.alone,
    )
    chosen = [case for case in cases.list_cases(options) if case.dtype == dtype]
    races = {str(case): track.forward(case) for case in chosen}
    where = f"{chosen[0].side_px} px, {dtype}"
    if options.steps:
        races[f"{options.steps} guided steps, {where}"] = track.guided(chosen[0], options.steps)
    if options.lcm_steps:
        races[f"{options.lcm_steps} steps of LCM, {where}"] = track.distilled(chosen[0], options.lcm_steps)
    for label, race in races.items():
        if has_time(options, label):
            yield run_race(label, race, best, options)


def run_race(label, race, best, options) -> dict:
    """Seconds of every round, bytes beside the weights, and the least time possible."""
    seconds = timing.take_turns(race.rivals, options.rounds, options.clock, options.device)
    memory = {name: peaks.measure_peak(run, options.device) for name, run in race.rivals.items()}
    median, least = statistics.median(seconds[OURS]), best.seconds(race.operations, race.bytes_moved)
    result = {"case": label, "seconds": seconds, "peak_bytes": memory, "roofline_s": least}
    said = f"{label}: {median:.4g} s, roofline {least:.4g} s ({least / median:.0%})"
    if memory[OURS]:
        said += f", {memory[OURS] / 2**20:.0f} MiB beside the weights"
    if DIFFUSERS in seconds:
        result["ratio"] = found = timing.compare(seconds, OURS, DIFFUSERS)
        said += f"; over diffusers {found['ratio']:.2f} ({found['least']:.2f} to {found['greatest']:.2f})"
    logger.info("%s", said)
    return result


if __name__ == "__main__":
    main()
