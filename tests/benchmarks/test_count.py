"""The counts of a step: of operations whose work is known, and of the model, which no change may raise unnoticed."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pixart_pack.benchmarks.count import ALONE, DTYPES, PROGRAMS, count_whole
from pixart_pack.benchmarks.count_memory import count_memory
from pixart_pack.benchmarks.count_training import count_training_whole
from pixart_pack.benchmarks.counting import Counter, Counts, fake
from pixart_pack.pixart.checkpoint import expected_shapes
from pixart_pack.pixart.config import CONFIGS
from pixart_pack.pixart.training.settings import TrainingSettings
from pixart_pack.tests.tiny_pixart import tiny_config

pytestmark = pytest.mark.slow  # seconds, most of them until PyTorch knows tensors of no device

# At 1024 px, a prompt and its negative: 452 kernels, 22.4 GB and 126.6 MiB when this was written.
MOST = Counts(kernels=460, bytes=22.6e9, casts=4, copies=8, peak=130 * 2**20)


def counted(act):
    with FakeTensorMode(), torch.inference_mode():
        given = fake((4, 8)), fake((8,), torch.bfloat16)
        with Counter() as counter:
            act(*given)
    return counter.counts()


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda x, y: x.view(8, 4).transpose(0, 1)[1:].unsqueeze(0), Counts(0, 0, 0, 0, 0)),
        (lambda x, y: torch.empty_like(x), Counts(0, 0, 0, 0, 128)),
        (lambda x, y: x.to(torch.float32).contiguous().float(), Counts(0, 0, 0, 0, 0)),
        (lambda x, y: x + 1, Counts(1, 256, 0, 0, 128)),
        (lambda x, y: x.add_(1), Counts(1, 128, 0, 0, 0)),
        (lambda x, y: y.expand(4, 8) * x, Counts(1, 16 + 256, 0, 0, 128)),
        (lambda x, y: y.float(), Counts(1, 16 + 32, 1, 0, 32)),
        (lambda x, y: x.t().contiguous(), Counts(1, 256, 0, 1, 128)),
        (lambda x, y: x.t().reshape(-1), Counts(1, 256, 0, 1, 128)),
        (lambda x, y: ((x + 1) * 2) + 3, Counts(3, 768, 0, 0, 256)),  # each is gone when the next but one comes
    ],
)
def test_operations_are_counted_as_what_they_do(act, expected):
    assert counted(act) == expected


def test_an_attention_is_one_kernel_that_holds_no_logits():
    def act(x, y):
        q = fake((2, 5, 48)).unflatten(2, (4, 12)).transpose(1, 2)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=fake((2, 1, 1, 5)))

    assert counted(act) == Counts(1, 4 * 4 * 480 + 40, 0, 0, 2 * 4 * 480 + 40)


def test_a_step_of_the_model_stays_as_lean_as_it_is():
    found = count_whole(ALONE, CONFIGS["alpha-1024"], torch.bfloat16, 1024)
    assert all(one <= most for one, most in zip(found, MOST, strict=True)), found


def test_a_training_step_casts_all_factors_at_once_and_keeps_what_the_setting_says():
    """At 512 px, batch 4. With casts of single factors there were 3121 kernels, 567 of them casts."""
    off, selective = (
        count_training_whole(CONFIGS["alpha-512"], 4, checkpointing=mode) for mode in ("off", "selective")
    )
    assert off.kernels <= 2600 and off.casts <= 7 and off.peak <= 3.9e9, off
    assert selective.kernels <= 2750 and selective.casts <= 7 and selective.peak <= 2.6e9, selective


def test_every_program_is_offered():
    assert len(PROGRAMS) == 4 and set(DTYPES) == {"bf16", "fp16", "fp8"}


def test_memory_of_a_training_is_less_with_what_saves_it():
    """States elsewhere are not counted, those of one weight are; weights are counted once."""
    config = tiny_config(depth=3)
    usual = {"kind": "full", "dtype": "bf16", "caption_dropout": 0.0, "checkpointing": "on"}
    saved = {"gradient_release": True, "offload_optimizer": True, "clip_norm": 0.0}
    plain, small = (count_memory(config, TrainingSettings(**usual, **fields)) for fields in ({}, saved))
    own = sum(math.prod(shape) for shape in expected_shapes(config).values()) * 4
    assert plain.weights == small.weights and 0.99 < plain.weights / own < 1.3  # and the table of positions
    assert plain.states == pytest.approx(2 * own, rel=0.05) and small.states == 0
    assert small.total < plain.total - 1.5 * own  # what a pass keeps is by far the most here
