"""Times of rivals in turns, and what the machine could do at best. Needs PyTorch alone."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CLOCKS = ("wall", "cpu")
MATRIX = (2048, 1152, 4608)  # the feed-forward layer at 512 px, batch 2
COPY_BYTES = 256 * 2**20
PROBES = 5


@dataclass(frozen=True)
class Roofline:
    """What the machine does at best: operations and bytes per second."""

    operations: float
    bandwidth: float

    def seconds(self, operations: float, bytes_moved: float) -> float:
        """The least time for so much work."""
        return max(operations / self.operations, bytes_moved / self.bandwidth)


def read_clock(clock: str, device: str) -> float:
    """Seconds. clock: "wall", or "cpu" for the processor time of this process, which a busy machine hardly changes."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if clock == "cpu" else time.perf_counter()


def take_turns(
    rivals: dict[str, Callable], rounds: int, clock: str, device: str, warm_up: dict[str, Callable] | None = None
) -> dict[str, list[float]]:
    """Seconds of every rival in every round, A B A B. A round before warms up and does not count.

    warm_up: what runs in that round; by default the rivals themselves.
    """
    for run in (rivals if warm_up is None else warm_up).values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            began = read_clock(clock, device)
            run()
            seconds[name].append(read_clock(clock, device) - began)
    return seconds


def compare(seconds: dict[str, list[float]], one: str, other: str) -> dict:
    """The ratio of two rivals, one over the other: median, least and greatest of the rounds."""
    ratios = sorted(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
    return {"ratio": statistics.median(ratios), "least": ratios[0], "greatest": ratios[-1]}


def measure_roofline(device: str, dtype: torch.dtype, clock: str) -> Roofline:
    """Measured with one large matrix product and one large copy, the best of a few."""
    rows, inner, columns = MATRIX
    left, right = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    products = take_turns({"": lambda: left @ right}, PROBES, clock, device)[""]
    copies = take_turns({"": lambda: target.copy_(source)}, PROBES, clock, device)[""]
    return Roofline(2 * rows * inner * columns / min(products), 2 * COPY_BYTES / min(copies))


def count_work(config, batch: int, tokens: int, caption: int, itemsize: int) -> tuple[float, float]:
    """(operations, bytes) of one forward pass whose captions are projected already.

    Matrix products alone; every weight is read once, and every block reads and writes its tokens once.
    """
    width = config.hidden_size
    inner = int(width * config.mlp_ratio)
    weights = config.depth * (6 * width**2 + 2 * width * inner)  # qkv, proj, q and proj of the cross-attention, mlp
    attention = config.depth * 2 * tokens * (tokens + caption) * width
    operations = 2 * batch * (tokens * weights + attention)
    return operations, itemsize * (weights + config.depth * 2 * batch * tokens * width)
