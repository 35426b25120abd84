"""Decoding a latent: the VAE as this pack loads it in ComfyUI, against diffusers' AutoencoderKL.

The same random weights, in turns. Memory is what a decode needs at its peak beyond the weights.
"""

import argparse
import logging
import statistics
import tempfile
from pathlib import Path

import torch

from ..pixart.encoders.autoencoder import KL_CONFIG, LATENT_CHANNELS
from .cases import DTYPES, name_device, parse_run
from .host import import_host
from .peaks import measure_peak
from .peers import DIFFUSERS, OURS
from .report import RESULTS, describe_ratio, keep_runs, markdown_table
from .timing import compare, read_clock

TILE, OVERLAP = 64, 16  # in latent pixels, what diffusers has for a VAE of this sample size
WARM_UP_SIDE = 16

logger = logging.getLogger(__name__)


def main(arguments):
    """Run the benchmark and write results/vae.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks vae", description=__doc__)
    parser.add_argument("--sides-px", type=int, nargs="*", default=[512, 1024], help="decoded in one piece")
    parser.add_argument("--tiled-px", type=int, nargs="*", default=[2048], help="decoded in tiles")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parse_run(parser, arguments)
    ours, theirs = make_pair(KL_CONFIG, options.device)
    text = ""
    for sides, is_tiled in ((options.sides_px, False), (options.tiled_px, True)):
        for side_px in sides:
            text = publish([measure(ours, theirs, side_px, is_tiled, options)], options.out)
    logger.info("%s", text)


def make_pair(config, device="cpu"):
    """(the host's VAE, diffusers') with the same random weights, in the dtype that the host chooses."""
    import_host(device)
    from diffusers import AutoencoderKL

    from ..nodes.host import loading

    torch.manual_seed(0)
    theirs = AutoencoderKL.from_config(config).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = loading.read_vae(Path(folder))
    return ours, torch.nn.Module.to(theirs, device, ours.vae_dtype)


def measure(ours, theirs, side_px, is_tiled, options) -> dict:
    """Seconds and peak bytes of both in every round, and their ratio."""
    device = theirs.device.type
    (theirs.enable_tiling if is_tiled else theirs.disable_tiling)()

    def decode_ours(latent):
        return ours.decode_tiled(latent, TILE, TILE, OVERLAP) if is_tiled else ours.decode(latent)

    def decode_theirs(latent):
        return theirs.decode(latent.to(theirs.device, theirs.dtype)).sample

    rivals = {OURS: decode_ours, DIFFUSERS: decode_theirs}
    found: dict[str, dict] = {field: {name: [] for name in rivals} for field in ("seconds", "peak")}
    latent = torch.randn(1, LATENT_CHANNELS, side_px // 8, side_px // 8)

    def take(name):
        began = read_clock(options.clock, device)
        rivals[name](latent)
        found["seconds"][name].append(read_clock(options.clock, device) - began)

    with torch.inference_mode():
        for decode in rivals.values():
            decode(latent[..., :WARM_UP_SIDE, :WARM_UP_SIDE])
        for _ in range(options.rounds):
            for name in rivals:
                found["peak"][name].append(measure_peak(lambda name=name: take(name), device))
    case = {
        "side_px": side_px,
        "tiled": is_tiled,
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == theirs.dtype),
        "device": name_device(device),
        "threads": torch.get_num_threads(),
        "clock": options.clock,
    }
    return {"case": case, **found, "ratio": compare(found["seconds"], OURS, DIFFUSERS)}


def publish(runs, folder):
    """Add runs to vae.json and write vae.md again. Returns its text."""
    rows = []
    for run in keep_runs(folder / "vae.json", runs):
        case = run["case"]
        seconds = [f"{statistics.median(run['seconds'][name]):.3g} s" for name in (OURS, DIFFUSERS)]
        peaks = [statistics.median(run["peak"][name]) for name in (OURS, DIFFUSERS)]
        rows.append(
            [f"{case['side_px']} px{', in tiles' * case['tiled']}", f"{case['dtype']}, {case['device']}"]
            + [f"{case['threads']} threads, {case['clock']} time, {len(run['seconds'][OURS])} rounds", *seconds]
            + [describe_ratio(run["ratio"]), *(f"{peak / 2**20:.0f} MiB" for peak in peaks)]
            + [f"{peaks[0] / peaks[1]:.2f}" if peaks[1] else "not measured"]
        )
    head = ["picture", "maths", "settings", f"time, {OURS}", f"time, {DIFFUSERS}", "ratio"]
    text = "Decoding a latent with the autoencoder of SD 1.5 and SDXL:\n\n"
    text += markdown_table([*head, f"memory, {OURS}", f"memory, {DIFFUSERS}", "ratio"], rows)
    (folder / "vae.md").write_text(text, encoding="utf-8")
    return text
