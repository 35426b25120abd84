"""Text encoding by this pack in ComfyUI: a prompt that was seen before, and captions padded as diffusers pads them.

Random weights of a T5 v1.1. A seen prompt's cost does not depend on the encoder, so fewer layers than the encoder has
make its ratio worse, not better.
"""

import argparse
import logging
import statistics
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from ..pixart.text import PAD_ID
from .cases import name_device, parse_run
from .host import import_host
from .report import RESULTS, describe_ratio, keep_runs, markdown_table
from .timing import compare, take_turns

# Source: the published configurations of google/t5-v1_1-*.
SIZES = {
    "small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    "xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "xxl": {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
}
ENCODED, SEEN = "encoded", "seen before"
CAPTION_LENGTHS = (120, 300)  # that diffusers pads to: alpha's and Sigma's
PROMPT = "Picture number {}: a small cactus with a happy face in the Sahara desert, detailed, soft light at noon"

logger = logging.getLogger(__name__)


def main(arguments):
    """Run the benchmark and write results/text.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks text", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="xxl")
    parser.add_argument("--layers", type=int, default=2, help="0: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parse_run(parser, arguments, rounds=5)
    import_host(options.device)
    fields = SIZES[options.size]
    fields = {**fields, "num_layers": options.layers or fields["num_layers"]}
    with tempfile.TemporaryDirectory() as folder:
        write_encoder(Path(folder) / "t5.safetensors", fields)
        run = measure(Path(folder), options, options.device)
    case = {
        "encoder": f"T5 v1.1 {options.size}",
        "layers": fields["num_layers"],
        "of": SIZES[options.size]["num_layers"],
        "device": name_device(options.device),
        "threads": torch.get_num_threads(),
        "clock": options.clock,
    }
    logger.info("%s", publish([{"case": case, **run}], options.out))


def write_encoder(path, fields):
    """A T5 v1.1 encoder with random weights in fp16."""
    config = T5Config(**fields, d_kv=64, vocab_size=32128, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in T5EncoderModel(config).state_dict().items()}
    del shapes["encoder.embed_tokens.weight"]  # the same as shared.weight
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 1.0)).half()
        for name, shape in shapes.items()
    }
    save_file(weights, path)


def measure(folder, options, device) -> dict:
    """Seconds of every way to a caption's states, and the time of one over another. folder: with t5.safetensors."""
    import_host()
    import folder_paths

    from ..nodes.host.text import captions, t5

    user = folder_paths.get_user_directory()
    folder_paths.set_user_directory(str(folder / "user"))  # where encoded prompts are kept
    clip = t5.load_t5(folder / "t5.safetensors")
    prompts = (PROMPT.format(number) for number in range(100, 1000))
    current = [""]

    def encode_new():
        current[0] = next(prompts)
        captions.encode_captions(clip, [current[0]], CAPTION_LENGTHS[0])

    def encode_padded(length):
        tokens = clip.tokenize(next(prompts))[t5.T5_NAME][0]
        clip.encode_from_tokens_scheduled({t5.T5_NAME: [tokens + [(PAD_ID, 1.0)] * (length - len(tokens))]})

    rivals = {ENCODED: encode_new, SEEN: lambda: captions.encode_captions(clip, current, CAPTION_LENGTHS[0])}
    for length in CAPTION_LENGTHS:
        rivals[f"padded to {length}"] = lambda length=length: encode_padded(length)
    try:
        with torch.inference_mode():
            seconds = take_turns(rivals, options.rounds, options.clock, device)
    finally:
        folder_paths.set_user_directory(user)
    ratios = {SEEN: compare(seconds, SEEN, ENCODED)}
    ratios |= {name: compare(seconds, ENCODED, name) for name in rivals if name not in (ENCODED, SEEN)}
    return {"tokens": len(clip.tokenize(current[0])[t5.T5_NAME][0]), "seconds": seconds, "ratios": ratios}


def publish(runs, folder):
    """Add runs to captions.json and write captions.md again. Returns its text."""
    rows = []
    for run in keep_runs(folder / "text.json", runs):
        case, seconds = run["case"], {name: statistics.median(values) for name, values in run["seconds"].items()}
        settings = (
            f"{case['device']}, {case['threads']} threads, {case['clock']} time, {len(run['seconds'][SEEN])} rounds"
        )
        rows.append(
            [f"{case['encoder']}, {case['layers']} of {case['of']} layers", run["tokens"], settings]
            + [f"{seconds[ENCODED]:.3g} s", f"{1000 * seconds[SEEN]:.2g} ms", describe_ratio(run["ratios"][SEEN], 4)]
            + [describe_ratio(run["ratios"][f"padded to {length}"]) for length in CAPTION_LENGTHS]
        )
    head = ["encoder", "tokens", "settings", ENCODED, SEEN, f"{SEEN} over {ENCODED}"]
    text = "A caption of so many tokens through T5, and a prompt whose states are kept on disk:\n\n"
    text += markdown_table([*head, *(f"over padded to {length}" for length in CAPTION_LENGTHS)], rows)
    (folder / "text.md").write_text(text, encoding="utf-8")
    return text
