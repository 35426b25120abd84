"""Loading a transformer from `.pth` in fp16 at full size: this pack against ComfyUI's own loader.

Each load runs in a process of its own, in turns; time until every weight has been read, and the peak of the process's
memory beyond what the imports took (Linux).
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ..pixart.config import CONFIGS
from .host import import_host
from .peers import make_config, make_weights
from .report import RESULTS, markdown_table

LOADERS = ("this pack", "ComfyUI")
VARIANT = "alpha-1024"

logger = logging.getLogger(__name__)


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def load_once(loader, path):
    """Load a file, read every weight, and print seconds and bytes as JSON."""
    import_host()
    import comfy.sd
    import comfy.utils

    from ..nodes.host import loading

    before, began = _peak_bytes(), time.perf_counter()
    if loader == "ComfyUI":
        patcher = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float16})
    else:
        patcher = loading.load_patcher(path, dtype="fp16")
    total = sum(
        float(p.detach().flatten()[:: 4096 // p.element_size()].float().sum()) for p in patcher.model.parameters()
    )
    seconds = time.perf_counter() - began
    sys.stdout.write(json.dumps({"seconds": seconds, "bytes": _peak_bytes() - before, "sum": total}) + "\n")


def main(arguments):
    """Run the benchmark and write results/load.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks load", description=__doc__)
    parser.add_argument("--depth", type=int, default=0, help="blocks (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.once:
        load_once(*options.once)
        return
    config = make_config(VARIANT, options.depth)
    runs = {loader: [] for loader in LOADERS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "PixArt-XL-2-1024-MS.pth"
        torch.save({"state_dict": make_weights(config, torch.float16)}, path)
        size = path.stat().st_size
        for _ in range(options.rounds):
            for loader in LOADERS:
                command = [sys.executable, "-m", __package__, "load", "--once", loader, str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[loader].append(json.loads(done.stdout.strip().splitlines()[-1]))
                logger.info("%s: %s", loader, runs[loader][-1])
    _publish(runs, size, options.out)


def _publish(runs, size, folder):
    rows = []
    for field, scale, unit in (("seconds", 1, "s"), ("bytes", 2**20, "MiB")):
        ours, theirs = (statistics.median(run[field] for run in runs[loader]) / scale for loader in LOADERS)
        rows.append([field, f"{ours:.2f} {unit}", f"{theirs:.2f} {unit}", f"{ours / theirs:.2f}"])
    text = f"`.pth` in fp16, {size / 2**20:.0f} MiB, {CONFIGS[VARIANT].base_px} px:\n\n"
    text += markdown_table(["", "this pack", "ComfyUI's loader", "ratio"], rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "load.json").write_text(json.dumps({"file_bytes": size, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    (folder / "load.md").write_text(text, encoding="utf-8")
    logger.info("%s", text)
