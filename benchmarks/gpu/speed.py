"""The benchmarks of speed on one device, each in a process of its own, and what of them has a goal."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..peers import DIFFUSERS, HOST
from ..ways import QUICKEST
from .parts import Finding

PART = "speed"
# A guided picture at 1024 px in 20 steps, over that of ComfyUI's own PixArt and of diffusers.
GOALS = {HOST: 0.85, DIFFUSERS: 0.75}
QUICKEST_GOALS = {(QUICKEST, HOST): 0.45}


class Run(NamedTuple):
    """One benchmark. options: for the device; small: to see in seconds that it works."""

    name: str
    options: Sequence[str]
    small: Sequence[str]


RUNS = (
    Run(
        "loop",
        ("--variants", "alpha-1024", "--dtype", "bf16"),
        ("--variants", "alpha-256", "--depth", "1", "--steps", "2"),
    ),
    Run(
        "ways",
        ("--variant", "alpha-1024", "--dtype", "bf16"),
        ("--variant", "alpha-256", "--depth", "2", "--steps", "4", "--lcm-steps", "1", "--rounds", "1"),
    ),
    Run("vae", (), ("--sides-px", "64", "--tiled-px", "--rounds", "1")),
    Run("text", ("--layers", "0"), ("--layers", "1", "--size", "small", "--rounds", "1")),
    Run("train", ("--depths", "28", "--batches", "1"), ("--depths", "1", "--batches", "1", "--rounds", "1")),
    Run(
        "denoiser",
        ("--sides-px", "512", "1024", "--dtypes", "bf16"),
        ("--sides-px", "256", "--depth", "1", "--batches", "2", "--captions", "20", "--rounds", "1"),
    ),
)


def measure(run: Run, device: str, is_small: bool, out: Path, left_s: float) -> list[Finding]:
    """Run a benchmark; its table is written to `out`. Raises RuntimeError with its last line when it fails."""
    options = run.small if is_small else run.options
    package = __package__.rpartition(".")[0]
    command = [sys.executable, "-m", package, run.name, "--device", device, "--out", str(out), *options]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=left_s, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    findings = [Finding(PART, run.name, time.perf_counter() - began, unit="s for all of it")]
    if run.name == "ways":
        (*_, last) = json.loads((out / "ways.json").read_text(encoding="utf-8"))["runs"]
        for way, ratios in last["ratios"].items():
            findings += [
                Finding(
                    PART, f"{way}, over {other}", ratio["ratio"], None if is_small else QUICKEST_GOALS.get((way, other))
                )
                for other, ratio in ratios.items()
                if way != other
            ]
            findings.append(Finding(PART, f"{way}, beside the weights", last["peak_bytes"][way] / 2**20, unit="MiB"))
    if run.name == "loop":
        (*_, last) = json.loads((out / "loop.json").read_text(encoding="utf-8"))["runs"]
        case = f"{last['case']['steps']} guided steps of {last['case']['variant']}"
        for rival, ratio in last["ratios"].items():
            goal = None if is_small else GOALS.get(rival)
            findings.append(Finding(PART, f"{case}, over {rival}", ratio["ratio"], goal))
    return findings
