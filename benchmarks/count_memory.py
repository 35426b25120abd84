"""What a training takes of a GPU's memory, counted without one: weights, states, gradients, and what a pass keeps.

A step of the model with 2 and with 3 blocks is made on the CPU, all that comes into being is counted, and every further
block adds the same.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import torch

from ..pixart.checkpoint import expected_shapes
from ..pixart.config import CONFIGS, PixArtConfig
from ..pixart.training.memory.piecewise import Piecewise
from ..pixart.training.optimizers import make_optimizer
from ..pixart.training.settings import TrainingSettings
from .counting import Counter
from .report import markdown_table
from .train import Ours, make_batch

CAPTION_TOKENS = 120
GB = 2**30
RESULTS = Path(__file__).parent / "results"
# Name -> (variant, settings).
CASES = {
    "all weights": ("alpha-512", {"kind": "full"}),
    "all weights, blocks recomputed": ("alpha-512", {"kind": "full", "checkpointing": "on"}),
    "all weights, the same, gradients released, states on the CPU": (
        "alpha-512",
        {"kind": "full", "checkpointing": "on", "gradient_release": True, "offload_optimizer": True, "clip_norm": 0.0},
    ),
    "LoRA": ("alpha-1024", {"rank": 16}),
    "LoRA, blocks recomputed": ("alpha-1024", {"rank": 16, "checkpointing": "on"}),
    "LoRA, blocks recomputed, base in nf4": ("alpha-1024", {"rank": 16, "checkpointing": "on", "base_dtype": "nf4"}),
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """In bytes. weights: of the model and adapters. states: of the optimiser, on the GPU. step: beyond them at most."""

    weights: float
    states: float
    step: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.states + self.step


def count_memory(config: PixArtConfig, settings: TrainingSettings) -> Memory:
    """Of a training at the size of the config, on the CPU, which the computing of a GPU does not differ from here."""
    shapes = expected_shapes(config)
    dtype = torch.float32 if settings.kind == "full" else torch.bfloat16
    weights = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    trainee = Ours(config, weights, make_batch(config, settings.batch_size, CAPTION_TOKENS), settings, "cpu", False)
    objective = trainee.objective
    named = {name: each for name, each in objective.named_parameters() if each.requires_grad}
    optimizer = make_optimizer(settings, named)
    piecewise = Piecewise(optimizer, named.values(), settings.gradient_release, is_offloaded=False)
    peak = 0
    for _ in range(2):  # the first one makes the states
        with Counter("cpu") as counter:
            objective.model.attention = counter.attend
            with torch.autocast("cpu", objective.dtype, enabled=objective.autocast):
                loss = trainee.loss()
            loss.backward()
            if not settings.gradient_release:
                piecewise.step()
        peak = counter.counts().peak
        optimizer.zero_grad(set_to_none=True)
        del loss
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    largest = 0
    if settings.offload_optimizer:  # those of one weight come for its step
        largest = max(sum(v.nbytes for v in state.values() if v.ndim) for state in optimizer.state.values())
    own = sum(tensor.nbytes for tensor in {id(t): t for t in _tensors(objective)}.values())
    return Memory(own, 0 if settings.offload_optimizer else sum(map(_bytes, states)), peak + largest)


def _bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def _tensors(module):
    return [*module.parameters(), *module.buffers()]


def count_whole(variant: str, **fields) -> Memory:
    """As `count_memory`, of a whole variant, from models of two and of three blocks."""
    usual = {"batch_size": 1, "dtype": "bf16", "caption_dropout": 0.0}
    settings, config = TrainingSettings(**{**usual, **fields}), CONFIGS[variant]
    few, more = (count_memory(dataclasses.replace(config, depth=depth), settings) for depth in (2, 3))
    rest = config.depth - 2
    return Memory(
        *(a + rest * (b - a) for a, b in zip(dataclasses.astuple(few), dataclasses.astuple(more), strict=True))
    )


def describe_memory() -> str:
    """All cases as Markdown."""
    rows = []
    for name, (variant, fields) in CASES.items():
        found = count_whole(variant, **fields)
        parts = [f"{value / GB:.2f}" for value in (found.weights, found.states, found.step, found.total)]
        rows.append([name, f"{CONFIGS[variant].base_px} px", *parts])
    head = ["training of XL/2, batch 1, bf16", "size", "weights", "states", "step", "all, GiB"]
    return markdown_table(head, rows)


def main(arguments):
    """Count, and write results/memory_of_training.md."""
    parser = argparse.ArgumentParser(prog="benchmarks count_memory", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory_of_training.md").write_text(describe_memory(), encoding="utf-8")
