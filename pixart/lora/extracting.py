"""Finds the LoRA that turns one model into another: the largest singular directions of their difference."""

import math
from collections.abc import Callable, Iterable

import torch

from ..quoting import shorten
from .kinds import Difference, Factor, LowRank
from .names import Target

Pair = Callable[[str], tuple[torch.Tensor, torch.Tensor]]


def extract_lora(
    names: Iterable[str],
    read: Pair,
    rank: int,
    energy: float = 1.0,
    keep_small: bool = True,
    report: Callable[[int, int], None] | None = None,
) -> tuple[dict[Target, Factor], float]:
    """The LoRA of a difference, and the share of the difference's energy (sum of squares) that it holds, 0 to 1.

    names: of parameters, in the original layout. read: gives (tuned, base) of one name, floating tensors.
    rank: the highest of any factor. energy: of each weight, as many directions as hold this share of its energy.
    keep_small: biases, norms and tables are kept as whole differences; otherwise they are left out.
    report: is called with (done, all) before each weight; what it raises ends the work.
    Raises ValueError when the models are the same or broken, or for a rank or energy that keeps nothing.
    """
    if rank < 1 or not 0 < energy <= 1:
        raise ValueError(
            f"Nothing to extract: got rank {rank} and energy {energy}, expected a rank of at least 1 and an energy "
            f"above 0 and up to 1. Choose larger ones."
        )
    names, factors, kept, whole = list(names), {}, 0.0, 0.0
    for done, name in enumerate(names):
        if report is not None:
            report(done, len(names))
        tuned, base = read(name)
        difference = tuned.float() - base.float()
        total = float(difference.double().square().sum())
        if not math.isfinite(total):
            raise ValueError(
                f"Broken weights: got infinite values or no numbers in {shorten(name)} of one of the models, expected "
                f"finite ones. Choose an earlier checkpoint of it."
            )
        is_small = difference.ndim < 2 or Target(name).module == name
        if not total or is_small and not keep_small:
            continue
        factor = Difference(difference) if is_small else factorize(difference, rank, energy)
        factors[Target(name)] = factor.to("cpu")
        whole += total
        kept += total - float((difference - factor.delta(difference)).double().square().sum())
    if not factors:
        raise ValueError(
            "No difference between the models: got equal weights, expected a fine-tuned model and its base. "
            "Connect two different models."
        )
    return factors, kept / whole


def factorize(difference: torch.Tensor, rank: int, energy: float = 1.0) -> LowRank:
    """The best LoRA of a weight's difference (rows, columns, ...) of at most `rank`, and no more than `energy` needs.

    Its scale is 1. Source: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
    """
    left, values, right = torch.linalg.svd(difference.flatten(1), full_matrices=False)
    squares = values.double().square()
    # Directions below float noise would only add rank.
    noise = values[0] * max(difference.flatten(1).shape) * torch.finfo(values.dtype).eps
    useful = int((values > noise).sum())
    share = squares.cumsum(0) / squares.sum()
    enough = int((share < energy).sum()) + 1
    count = max(1, min(rank, useful, enough))
    root = values[:count].sqrt()
    kernel = [1] * (difference.ndim - 2)
    up = (left[:, :count] * root).reshape(-1, count, *kernel)
    down = (right[:count] * root[:, None]).reshape(count, *difference.shape[1:])
    return LowRank(down.contiguous(), up.contiguous(), alpha=float(count))
