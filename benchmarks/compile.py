"""torch.compile: how many graphs, breaks and recompilations a series of situations takes, and how long compiling takes.

The counts are of this pack under ComfyUI's own TorchCompileModel, of ComfyUI's own PixArt under the same node, and of
diffusers' under torch.compile: the same tiny random weights, each fed as its own program feeds it. A graph's kernels do
not matter here, so none are made. With --times, this pack's block against the whole model, by the compiler itself.
"""

import argparse
import dataclasses
import json
import logging
import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ..pixart.acceleration.compilation import compile_blocks
from ..pixart.config import CONFIGS
from ..pixart.transformer import PixArt
from .host import import_host
from .peers import (
    DIFFUSERS,
    GUIDANCE,
    HOST,
    OURS,
    TIMESTEP,
    DiffusersLoop,
    HostLoop,
    OurLoop,
    make_captions,
    make_weights,
)
from .report import RESULTS, markdown_table

LIMIT = 64  # graphs of one function, so that all are counted; PyTorch's own is 8, and what comes then runs uncompiled
NARROW = {"depth": 28, "hidden_size": 144, "num_heads": 4, "caption_channels": 64}
TINY = {"depth": 2, "hidden_size": 64, "num_heads": 4, "caption_channels": 32}

logger = logging.getLogger(__name__)


class Situation(NamedTuple):
    """height, width: of the latent. lengths: of the prompt and its negative, or of the prompt alone."""

    name: str
    height: int
    width: int
    lengths: tuple[int, ...]
    batch: int = 1


SITUATIONS = (
    Situation("a first picture", 64, 64, (20, 1)),
    Situation("a wide one", 48, 88, (20, 1)),
    Situation("a tall one", 88, 48, (20, 1)),
    Situation("an odd size", 63, 75, (20, 1)),
    Situation("another prompt", 63, 75, (33, 5)),
    Situation("without guidance", 64, 64, (20,)),
    Situation("another prompt, without guidance", 48, 88, (9,)),
    Situation("a batch of 3", 64, 64, (20, 1), 3),
    Situation("the first again", 64, 64, (20, 1)),
)


class Counted(NamedTuple):
    """graphs: compiled so far. breaks: within the model. difference: the greatest from uncompiled, or what it says."""

    graphs: int
    breaks: int
    difference: float | str


def main(arguments):
    """Run the benchmark and write results/compile.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks compile", description=__doc__)
    parser.add_argument("--times", action="store_true", help="measure how long compiling takes, too (minutes)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    found = {"counts": {name: [tuple(each) for each in counts] for name, counts in count_all().items()}}
    path = options.out / "compile.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if options.times:
        found["times"] = {kind: measure(kind) for kind in ("block", "whole")}
    found = {**kept, **found}
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = describe(found)
    (options.out / "compile.md").write_text(text, encoding="utf-8")
    logger.info("%s", text)


def count_all(programs=(OURS, HOST, DIFFUSERS), shrink=1):
    """Counted after each of SITUATIONS, by the name of the program. shrink: by how much the pictures are smaller."""
    import_host("cpu")
    config = dataclasses.replace(CONFIGS["alpha-512"], **TINY)
    weights = make_weights(config, torch.float32)
    kinds = {OURS: OurLoop, HOST: HostLoop, DIFFUSERS: DiffusersLoop}
    situations = [each._replace(height=each.height // shrink, width=each.width // shrink) for each in SITUATIONS]
    return {name: count(kinds[name](config, weights, torch.float32, "cpu"), config, situations) for name in programs}


def count(loop, config, situations):
    """Counted after each of the situations, of one program: graphs and breaks are of all situations so far."""
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    counter, found = CompileCounter(), []
    predict = _predict_in_host if isinstance(loop, OurLoop) else _predict_in_diffusers
    compiled = _compiled(loop, counter)
    with torch._dynamo.config.patch(recompile_limit=LIMIT), torch.inference_mode():
        for situation in situations:
            captions = make_captions(config, situation.lengths, torch.float32)
            try:
                expected = predict(loop, loop.patcher if isinstance(loop, OurLoop) else loop.net, captions, situation)
                difference = (predict(loop, compiled, captions, situation) - expected).abs().max().item()
            except Exception as error:  # noqa: BLE001  whatever it is, is the result
                difference = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]}"
            found.append(Counted(counter.frame_count, sum(counters["graph_break"].values()), difference))
    return found


def _compiled(loop, counter):
    if isinstance(loop, DiffusersLoop):
        return torch.compile(loop.net, backend=counter)
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    patcher = loop.patcher.clone(disable_dynamic=True)
    set_torch_compile_wrapper(patcher, backend=counter, options={"guard_filter_fn": skip_torch_compile_dict})
    return patcher


def _predict_in_host(_loop, patcher, captions, situation):
    import comfy.sample

    latent = torch.zeros(situation.batch, 4, situation.height, situation.width)
    noise = comfy.sample.prepare_noise(latent, 5)
    positive, negative = ([[states, {"pooled_output": None}]] for states in (captions[0], captions[-1]))
    guidance = GUIDANCE if len(captions) > 1 else 1.0
    return comfy.sample.sample(
        patcher, noise, 1, guidance, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=5
    )


def _predict_in_diffusers(loop, net, captions, situation):
    rows = len(captions) * situation.batch
    latent = torch.randn(rows, 4, situation.height, situation.width, generator=torch.Generator().manual_seed(5))
    states, mask = loop.pad([caption for caption in captions for _ in range(situation.batch)])
    return net(
        latent, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=torch.full((rows,), TIMESTEP),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
    )[0]  # fmt: skip


def measure(kind):
    """Seconds of processor time of a model of 28 narrow blocks: the first call at each of three sizes, then one more.

    kind: "block", one compiled for all; "whole", the model in one piece; both by inductor, without its caches.
    """
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read when the compiler is imported; else others take part
    torch._dynamo.reset()
    config = dataclasses.replace(CONFIGS["alpha-512"], **NARROW)
    model = PixArt(config).eval()
    model.load_state_dict(make_weights(config, torch.float32))
    run = model if kind == "block" else torch.compile(model)
    if kind == "block":
        compile_blocks(model)
    generator, found = torch.Generator().manual_seed(1), []
    import torch._inductor.config as inductor

    with torch.inference_mode(), inductor.patch(force_disable_caches=True):
        for height, width in ((16, 16), (12, 22), (22, 14)):
            latent = torch.randn(2, 4, height, width, generator=generator)
            given = latent, torch.tensor([500.0]), torch.randn(2, 20, config.caption_channels, generator=generator)
            mask = torch.ones(2, 20, dtype=torch.bool)
            found.append(_seconds(lambda given=given, mask=mask: run(*given, mask)))
        warm = min(_seconds(lambda: run(*given, mask)) for _ in range(5))
    return {"first_calls_s": found, "later_call_s": warm}


def _seconds(act):
    before = _spent()
    act()
    return _spent() - before


def _spent():
    """Processor time of this process and of the compilers that it ran."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def describe(found):
    """The results as Markdown."""
    rows = []
    for index, situation in enumerate(SITUATIONS):
        cells = [situation.name]
        for name in (OURS, HOST, DIFFUSERS):
            graphs, breaks, difference = found["counts"][name][index]
            cells.append(f"fails: {difference}" if isinstance(difference, str) else f"{graphs} and {breaks}")
        rows.append(cells)
    text = (
        "Graphs and breaks so far under `torch.compile`, situation after situation. Breaks cut a model into functions, "
    )
    text += "of which each has graphs of its own:\n\n"
    text += markdown_table(["situation", OURS, f"{HOST}'s own", DIFFUSERS], rows)
    if "times" in found:
        rows = [
            [
                kind,
                *(f"{seconds:.1f} s" for seconds in times["first_calls_s"]),
                f"{times['later_call_s'] * 1000:.0f} ms",
            ]
            for kind, times in found["times"].items()
        ]
        text += "\n28 narrow blocks (width 144), inductor on a CPU, processor time with the C++ compiler's:\n\n"
        text += markdown_table(["compiled", "first size", "second size", "third size", "a later call"], rows)
    return text
