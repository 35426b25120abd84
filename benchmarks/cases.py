"""What one forward pass is measured on: sizes, batches and captions from the command line. Needs PyTorch alone."""

import argparse
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..pixart.weights.saving import DTYPES
from .timing import CLOCKS

DEVICES = ("cpu", "cuda")
MIXED = "mixed"
MIXED_LENGTHS = (20, 120)


class Case(NamedTuple):
    """One forward pass. lengths: tokens of every row's caption."""

    side_px: int
    lengths: tuple[int, ...]
    dtype: str

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Of the picture, for patches of two latent pixels."""
        return (self.side_px // 16) ** 2

    def __str__(self):
        lengths = " and ".join(map(str, dict.fromkeys(self.lengths)))
        return f"{self.side_px} px, batch {self.batch}, captions of {lengths} tokens, {self.dtype}"


def add_options(parser: argparse.ArgumentParser, *, dtypes: list[str], batches: tuple[int, ...] | None = None) -> None:
    """The options that choose cases. batches: those that can be measured, None for any."""
    parser.add_argument("--sides-px", type=int, nargs="+", default=[512])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2], choices=batches)
    parser.add_argument(
        "--captions", type=_length, nargs="+", default=[20, 120, MIXED], help=f"tokens, or {MIXED}: in turns both"
    )
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=dtypes)
    parser.add_argument("--depth", type=int, default=0, help="blocks (default: all)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option that says where models run: the GPU where there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=default, help=f"cpu or cuda (default: {default})")


def _device(text: str) -> str:
    if text not in DEVICES:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {' or '.join(DEVICES)}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            "got 'cuda', expected cpu: PyTorch finds no GPU here. Install a PyTorch with CUDA where there is one"
        )
    return text


def name_device(device: str) -> str:
    """As which results know it: a GPU by its name."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def parse_run(
    parser: argparse.ArgumentParser, arguments: list[str] | None, rounds: int | None = 3
) -> argparse.Namespace:
    """Parse the arguments, among them how often, where, on how many threads and by which clock; set the threads.

    rounds: the default; None where runs are not repeated.
    """
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
    add_device(parser)
    parser.add_argument("--threads", type=int, default=0, help="default: PyTorch's")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def _length(text: str) -> int | str:
    return text if text == MIXED else int(text)


def list_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every combination of the options; a batch of one has no mixed captions."""
    for dtype, side_px, batch, caption in itertools.product(
        options.dtypes, options.sides_px, options.batches, options.captions
    ):
        if caption != MIXED:
            yield Case(side_px, (caption,) * batch, dtype)
        elif batch > 1:
            yield Case(side_px, tuple(itertools.islice(itertools.cycle(MIXED_LENGTHS), batch)), dtype)
