"""Times of rivals in turns, and what the machine could do at best. Needs PyTorch alone."""

import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

CLOCKS = ("wall", "cpu")
# On a CPU the feed-forward layer at 512 px, batch 2; on a GPU what takes far longer than to ask for it.
MATRICES = {"cpu": (2048, 1152, 4608), "cuda": (8192, 8192, 8192)}
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
PROBES = 5


@dataclass(frozen=True)
class Roofline:
    """What the machine does at best: operations and bytes per second."""

    operations: float
    bandwidth: float

    def seconds(self, operations: float, bytes_moved: float) -> float:
        """The least time for so much work."""
        return max(operations / self.operations, bytes_moved / self.bandwidth)

    def or_better(self, other: "Roofline") -> "Roofline":
        """The best of two measurements."""
        return Roofline(max(self.operations, other.operations), max(self.bandwidth, other.bandwidth))


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


def take_turns_in_steps(rivals: dict[str, Callable], clock: str, device: str) -> dict[str, list[float]]:
    """Seconds of every rival's steps, which take turns, so that a machine that slows down does so for all.

    rivals: functions that call the function they are given after each step.
    """
    turns = {name: threading.Semaphore(0) for name in rivals}
    waiting, done = threading.Semaphore(0), set()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}

    def run(name: str) -> None:
        turns[name].acquire()
        began = read_clock(clock, device)

        def pause(*_) -> None:
            nonlocal began
            seconds[name].append(read_clock(clock, device) - began)
            waiting.release()
            turns[name].acquire()
            began = read_clock(clock, device)

        try:
            rivals[name](pause)
            seconds[name][-1] += read_clock(clock, device) - began  # what follows the last step
        finally:
            done.add(name)
            waiting.release()

    with ThreadPoolExecutor(len(rivals)) as threads:  # one runs, the others wait
        loops = [threads.submit(run, name) for name in rivals]
        while len(done) < len(rivals):
            for name in [each for each in rivals if each not in done]:
                turns[name].release()
                waiting.acquire()
    for loop in loops:
        loop.result()
    return seconds


def compare_loops(seconds: dict[str, list[float]], one: str, other: str) -> dict:
    """The ratio of two whole loops, and the least and the greatest in the middle half of their steps."""
    ratios, ratio = _sorted_ratios(seconds, one, other), sum(seconds[one]) / sum(seconds[other])
    outer = len(ratios) // 4
    return {"ratio": ratio, "least": ratios[outer], "greatest": ratios[-1 - outer]}


def compare(seconds: dict[str, list[float]], one: str, other: str) -> dict:
    """The ratio of two rivals, one over the other: median, least and greatest of the rounds."""
    ratios = _sorted_ratios(seconds, one, other)
    return {"ratio": statistics.median(ratios), "least": ratios[0], "greatest": ratios[-1]}


def _sorted_ratios(seconds: dict[str, list[float]], one: str, other: str) -> list[float]:
    return sorted(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def measure_roofline(device: str, dtype: torch.dtype, clock: str) -> Roofline:
    """Measured with one large matrix product and one large copy, the best of a few."""
    rows, inner, columns = MATRICES[device]
    left, right = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    products = take_turns({"": lambda: left @ right}, PROBES, clock, device)[""]
    copies = take_turns({"": lambda: target.copy_(source)}, PROBES, clock, device)[""]
    return Roofline(2 * rows * inner * columns / min(products), 2 * source.nbytes / min(copies))


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
