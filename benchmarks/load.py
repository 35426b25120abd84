"""Loading a transformer in fp16 from a `.pth`, a safetensors file and a diffusers folder: this pack against others.

Each load runs in a process of its own, in turns: until every weight has been read once, from a file that the system has
in its cache. Memory is what the process has resident at its peak beyond what it had before, pages that are mapped from
the file included; "own" is the part that is still there at the end and not mapped from a file (Linux).
"""

import argparse
import importlib
import logging
import multiprocessing
import statistics
import tempfile
from pathlib import Path

import torch

from ..pixart.weights.saving import save_checkpoint
from .cases import name_device, parse_run
from .host import import_host
from .peaks import PeakMemory, read_status
from .peers import DIFFUSERS, HOST, OURS, make_config, make_weights
from .report import RESULTS, describe_ratio, keep_runs, markdown_table
from .timing import compare, read_clock

VARIANT = "alpha-1024"
NAME = "PixArt-XL-2-1024-MS"
FORMATS = {
    "pth": (f"{NAME}.pth", (OURS, HOST)),
    "safetensors": (f"{NAME}.safetensors", (OURS, HOST)),
    "folder": (NAME, (OURS, HOST, DIFFUSERS)),
}

logger = logging.getLogger(__name__)


def main(arguments):
    """Run the benchmark and write results/load.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks load", description=__doc__)
    parser.add_argument("--formats", choices=FORMATS, nargs="+", default=list(FORMATS))
    parser.add_argument("--depth", type=int, default=0, help="blocks (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parse_run(parser, arguments)
    import_all(options.device)
    depth = make_config(VARIANT, options.depth).depth
    for kind in options.formats:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FORMATS[kind][0]
            size = run_apart(options.device, write_weights, path, depth)
            runs = measure(path, FORMATS[kind][1], options)
        case = {"format": kind, "blocks": depth, "threads": torch.get_num_threads(), "clock": options.clock}
        case |= {"device": name_device(options.device)} if options.device != "cpu" else {}
        text = publish([{"case": case, "weights_bytes": size, **runs}], options.out)
    logger.info("%s", text)


def import_all(device="cpu"):
    """Import whatever a loader needs, so that no import is measured."""
    import_host(device)
    importlib.import_module("comfy.sd")
    importlib.import_module("..nodes.host.loading", __package__)
    diffusers = importlib.import_module("diffusers")
    return diffusers.PixArtTransformer2DModel


def run_apart(device, function, *arguments):
    """Run a function in a process of its own, which has imported what this one has. CUDA cannot be handed on so."""
    with multiprocessing.get_context("spawn" if device == "cuda" else "fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def write_weights(path, depth) -> int:
    """Write random weights in fp16. Returns their bytes."""
    config = make_config(VARIANT, depth)
    weights = make_weights(config, torch.float16)
    save_checkpoint(path, weights, config)
    return sum(tensor.nbytes for tensor in weights.values())


def measure(path, loaders, options) -> dict:
    """Seconds, peak and own bytes of every loader in every round."""
    found: dict[str, dict] = {field: {loader: [] for loader in loaders} for field in ("seconds", "peak", "own")}
    for number in range(options.rounds + 1):  # the first fills the system's cache
        for loader in loaders:
            told = run_apart(options.device, load_once, loader, path, options.clock, options.device)
            logger.info("%s: %s", loader, told)
            for field, values in found.items():
                values[loader] += [told[field]] * bool(number)
    return found


def load_once(loader, path, clock="wall", device="cpu") -> dict:
    """Load a file or folder and read every weight, which for a GPU is to send it there."""
    diffusers_class = import_all(device)
    import comfy.sd

    from ..nodes.host import loading

    transformer = path / "transformer"
    file = next(transformer.glob("*.safetensors")) if path.is_dir() else path
    loaders = {
        OURS: lambda: loading.load_patcher(path, dtype="fp16").model,
        HOST: lambda: comfy.sd.load_diffusion_model(str(file), model_options={"dtype": torch.float16}).model,
        DIFFUSERS: lambda: diffusers_class.from_pretrained(transformer, torch_dtype=torch.float16),
    }
    memory = PeakMemory()
    memory.reset()
    before, own, began = memory.read(), read_status("RssAnon"), read_clock(clock, device)
    model = loaders[loader]().to(device)
    for parameter in model.parameters() if device == "cpu" else ():
        float(parameter.detach().flatten()[:: 4096 // parameter.element_size()].float().sum())  # touches every page
    seconds = read_clock(clock, device) - began
    return {"seconds": seconds, "peak": memory.read() - before, "own": read_status("RssAnon") - own}


def publish(runs, folder):
    """Add runs to load.json and write load.md again. Returns its text."""
    rows = []
    for run in keep_runs(folder / "load.json", runs):
        case = run["case"]
        settings = f"{case['threads']} threads, {case['clock']} time, {len(run['seconds'][OURS])} rounds"
        settings += f", to {case['device']}" if "device" in case else ""
        for name in run["seconds"]:
            seconds, peak, own = (statistics.median(run[field][name]) for field in ("seconds", "peak", "own"))
            ratios = [describe_ratio(compare(run[field], OURS, name)) for field in ("seconds", "peak")]
            rows.append(
                [case["format"], f"{run['weights_bytes'] / 2**20:.0f} MiB", settings, name, f"{seconds:.2f} s"]
                + [f"{peak / 2**20:.0f} MiB", f"{own / 2**20:.0f} MiB", *(ratios if name != OURS else ["", ""])]
            )
    head = ["format", "weights in fp16", "settings", "loader", "time", "memory at the peak", "own at the end"]
    text = "Loading a transformer of XL/2's width, and the time and memory of this pack over each other's:\n\n"
    text += markdown_table([*head, "time over it", "memory over it"], rows)
    (folder / "load.md").write_text(text, encoding="utf-8")
    return text
