"""DPM-Solver++, multistep, data prediction. Source: arXiv 2211.01095."""

import logging
import math
import reprlib

from .contract import Denoiser, check_sigmas, steps, steps_to_lower
from .exponential import adams_weights, moments

MAX_ORDER = 3
SHORT_RUN = 10
LOWER_ORDER_FINAL = ("always", "short_runs", "never")


def sample_dpm_solver(
    model, x, sigmas, extra_args=None, callback=None, disable=None, order=2, lower_order_final="always"
):
    """Solve the probability-flow ODE with DPM-Solver++ multistep.

    model(x, sigma, **extra_args) -> denoised. x: (B, C, H, W), variance exploding. sigmas: descending, >= 2 values.
    order: 1 to 3. lower_order_final: lower the order over the last steps "always" (PixArt-sigma), in runs of fewer than
        10 steps ("short_runs", PixArt-alpha) or "never". A step to sigma 0 is always of first order.
    Returns the latent at the last sigma.
    """
    levels = check_sigmas(sigmas)
    count = len(levels) - 1
    order = _check_order(order, lower_order_final, count)
    lower = lower_order_final == "always" or (lower_order_final == "short_runs" and count < SHORT_RUN)
    last = steps_to_lower(levels)
    denoise = Denoiser(model, levels, extra_args, callback)
    history = []
    for i in steps(levels, disable):
        history = [denoise(x, i), *history][:order]
        used = min(len(history), max(1, last - i)) if lower else len(history)
        x = _step(x, levels[max(0, i - used + 1) : i + 2], history[:used])
    return x


def _step(x, levels, outputs):
    """One step from levels[-2] to levels[-1]; outputs: the model's, newest first, at levels[-2], levels[-3], ..."""
    source, target = levels[-2:]
    if target == 0.0:
        return outputs[0]
    h = math.log(source / target)
    x = x * (target / source) - outputs[0] * math.expm1(-h)
    if len(outputs) == 1:
        return x
    ratios = [math.log(level / source) / h for level in levels[-3::-1]]
    if len(outputs) == 2:
        return x - (0.5 * math.expm1(-h) / ratios[0]) * (outputs[0] - outputs[1])
    # The published code halves the second-difference term, which costs the third order; this is the exact integral.
    weights = adams_weights([0.0, *(-ratio for ratio in ratios)], moments(h, len(outputs)))
    return x + sum(w * (m - outputs[0]) for w, m in zip(weights[1:], outputs[1:], strict=True))


def _check_order(order, lower_order_final, count):
    if order not in range(1, MAX_ORDER + 1):
        raise ValueError(f"DPM-Solver++ order is out of range: got {order}, expected 1, 2 or 3. Set the order to 2.")
    if lower_order_final not in LOWER_ORDER_FINAL:
        raise ValueError(
            f"Unknown lower_order_final: got {reprlib.repr(lower_order_final)}, expected one of "
            f"{', '.join(LOWER_ORDER_FINAL)}. Choose one of these."
        )
    if order > count:
        logging.warning("DPM-Solver++ of order %d has only %d steps; it runs at order %d.", order, count, count)
    return min(order, count)
