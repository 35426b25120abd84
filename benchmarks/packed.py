"""One caption through a T5 v1.1 whose weights stay in GGUF's blocks, in ComfyUI: time, and memory at the peak.

Random blocks of the real shapes, in a file that the system has in its cache. A process of its own loads the file and
encodes; memory is what it has resident at its peak beyond what its imports took, pages mapped from the file included.
"""

import argparse
import importlib
import logging
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel

from ..pixart.weights.quantised.blocks import BLOCK_TYPES
from ..pixart.weights.quantised.gguf_file import llama_name
from .cases import parse_run
from .host import import_host
from .load import run_apart
from .peaks import PeakMemory
from .report import RESULTS, keep_runs, markdown_table
from .text import PROMPT, SIZES
from .timing import read_clock

# Type -> its scales' places in a block, each with what makes numbers around zero of random bytes.
SCALES = {
    "Q8_0": {0: 1.0},
    "Q4_0": {0: 1.0},
    "Q4_K": {0: 1.0, 2: 7.5},
    "Q5_K": {0: 1.0, 2: 15.5},
    "Q6_K": {208: 1.0},
}
KINDS = {kind.name: kind for kind in BLOCK_TYPES.values()}

logger = logging.getLogger(__name__)


def main(arguments):
    """Run the benchmark and write results/packed.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks packed", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="xxl")
    parser.add_argument("--layers", type=int, default=0, help="default: all")
    parser.add_argument("--kinds", choices=SCALES, nargs="+", default=["Q4_K"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parse_run(parser, arguments, rounds=1)
    import_host("cpu")
    importlib.import_module("..nodes.host.text.captions", __package__)  # so that no import is measured
    fields = SIZES[options.size] | ({"num_layers": options.layers} if options.layers else {})
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "t5.gguf"
            run_apart("cpu", write_encoder, path, fields, kind)
            runs = [run_apart("cpu", encode_once, path, options.clock) for _ in range(options.rounds)]
            case = {"encoder": f"T5 v1.1 {options.size}", "layers": fields["num_layers"], "kind": kind}
            case |= {"threads": torch.get_num_threads(), "clock": options.clock}
            text = publish([{"case": case, "file_bytes": path.stat().st_size, "runs": runs}], options.out)
    logger.info("%s", text)


def write_encoder(path, fields, kind_name):
    """A T5 v1.1 encoder with random blocks for its matrices and its table of words, as converters choose them."""
    import gguf

    with torch.device("meta"):
        network = T5EncoderModel(T5Config(**fields, d_kv=64, vocab_size=32128, feed_forward_proj="gated-gelu"))
    shapes = {llama_name(name): tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    del shapes[None]  # encoder.embed_tokens is shared.weight
    whole = {name for name, shape in shapes.items() if len(shape) == 2 and shape[-1] % KINDS[kind_name].count == 0}
    kinds = {name: kind_name if name in whole and "rel_b" not in name else "F32" for name in shapes}
    writer, generator = gguf.GGUFWriter(path, "t5encoder"), torch.Generator().manual_seed(0)
    numbers = torch.empty(0).numpy().dtype
    for name, shape in shapes.items():
        kind, stored = KINDS[kinds[name]], gguf.GGMLQuantizationType[kinds[name]]
        size = torch.Size(shape).numel() // kind.count * kind.size
        writer.add_tensor_info(name, list(shape), numbers, size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        if kinds[name] == "F32":
            writer.write_tensor_data(torch.randn(shape, generator=generator).numpy())
        else:
            spread = 1.0 if name.startswith("token_embd") else shape[-1] ** -0.5
            count = torch.Size(shape).numel() // KINDS[kind_name].count
            writer.write_tensor_data(random_blocks(KINDS[kind_name], count, spread, generator).numpy())
    writer.close()


def random_blocks(kind, count, spread, generator):
    """Blocks (count, kind.size) uint8 whose numbers scatter by `spread` around zero."""
    blocks = torch.randint(0, 256, (count, kind.size), dtype=torch.uint8, generator=generator)
    set_scales(blocks, kind, 1.0)
    set_scales(blocks, kind, spread / float(kind.expand(blocks[:64]).std()))
    return blocks


def set_scales(blocks, kind, scale):
    """Gives all blocks the same scales."""
    for place, factor in SCALES[kind.name].items():
        blocks[:, place : place + 2] = torch.tensor([scale * factor], dtype=torch.float16).view(torch.uint8)


def encode_once(path, clock) -> dict:
    """Load a file and encode one caption. Seconds of each, bytes at the peak, and whether the states are finite."""
    import_host("cpu")
    from ..nodes.host.text import captions, t5

    memory = PeakMemory()
    memory.reset()
    before, began = memory.read(), read_clock(clock, "cpu")
    clip = t5.load_t5(path)
    loaded = read_clock(clock, "cpu")
    with torch.inference_mode():
        ((states, _),), _ = captions.encode_captions(clip, [PROMPT.format(1)], 300, keep=False)
    encoded = read_clock(clock, "cpu")
    return {
        "load": loaded - began,
        "encode": encoded - loaded,
        "tokens": states.shape[1],
        "peak": memory.read() - before,
        "finite": bool(torch.isfinite(states).all()),
    }


def publish(runs, folder):
    """Add runs to packed.json and write packed.md again. Returns its text."""
    rows = []
    for run in keep_runs(folder / "packed.json", runs):
        case, found = run["case"], run["runs"]
        middle = {name: statistics.median(each[name] for each in found) for name in ("load", "encode", "peak")}
        rows.append(
            [f"{case['encoder']}, {case['layers']} layers", case["kind"], f"{run['file_bytes'] / 1e9:.2f} GB"]
            + [f"{middle['peak'] / 1e9:.2f} GB", f"{middle['load']:.1f} s", f"{middle['encode']:.1f} s"]
            + [found[0]["tokens"], f"{case['threads']} threads, {case['clock']} time, {len(found)} rounds"]
        )
    head = ["encoder", "blocks", "file", "memory at the peak", "loading", "a caption", "tokens", "settings"]
    text = "A caption through a T5 whose weights stay in GGUF's blocks, on the CPU:\n\n" + markdown_table(head, rows)
    (folder / "packed.md").write_text(text, encoding="utf-8")
    return text
