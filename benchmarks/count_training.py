"""The step of a LoRA's training on a GPU, counted without one: forward and backward, on tensors without numbers."""

import dataclasses

import torch

from ..pixart.checkpoint import expected_shapes
from ..pixart.config import CONFIGS, PixArtConfig
from ..pixart.training.settings import CHECKPOINTING, TrainingSettings
from .counting import Counter, Counts
from .report import markdown_table
from .train import RANK, Ours, make_batch

VARIANT, BATCH = "alpha-512", 4
CAPTION_TOKENS = 20  # as in `train`
DEVICE = "meta"  # where a backward pass runs without a GPU


def count_training(config: PixArtConfig, batch_size: int, **settings) -> Counts:
    """What a step is, in bf16 with factors in float32, at the size of the config.

    Clipping and a fused optimiser are a few kernels more. settings: others than usual.
    """
    chosen = TrainingSettings(
        **{"rank": RANK, "batch_size": batch_size, "dtype": "bf16", "caption_dropout": 0.0, **settings}
    )
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16, device=DEVICE) for name, shape in expected_shapes(config).items()
    }
    trainee = Ours(config, weights, make_batch(config, batch_size, CAPTION_TOKENS), chosen, DEVICE, fused=False)
    for _ in range(2):  # what the first one makes and keeps is there in every other
        trainee.optimizer.zero_grad(set_to_none=True)
        with Counter(DEVICE) as counter:
            trainee.objective.model.attention = counter.attend
            trainee.loss().backward()
    return counter.counts()


def count_training_whole(config: PixArtConfig, batch_size: int, **settings) -> Counts:
    """As `count_training`, from models of two and of three blocks: every block adds the same."""
    few, more = (count_training(dataclasses.replace(config, depth=depth), batch_size, **settings) for depth in (2, 3))
    return Counts(*(low + (config.depth - 2) * (high - low) for low, high in zip(few, more, strict=True)))


def describe_training():
    """The training step as Markdown."""
    rows = []
    for targets in ("attention", "blocks"):
        for mode in CHECKPOINTING:
            counts = count_training_whole(CONFIGS[VARIANT], BATCH, targets=targets, checkpointing=mode)
            touched, peak = f"{counts.bytes / 1e9:.1f} GB", f"{counts.peak / 1e9:.2f} GB"
            rows.append([targets, mode, counts.kernels, touched, counts.casts, peak])
    head = ["layers", "checkpointing", "kernels", "memory touched", "casts", "activations"]
    text = f"\nA LoRA's step, {VARIANT}, batch {BATCH}, bf16: forward and backward.\n\n"
    return text + markdown_table(head, rows)
