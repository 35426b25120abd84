"""DPM-Solver++, multistep, data prediction. Source: arXiv 2211.01095."""

import logging
import math
import reprlib

from .contract import Denoiser, check_sigmas, steps, steps_to_lower
from .exponential import adams_weights, moments
from .noise import noise_source

MAX_ORDER = 3
SHORT_RUN = 10
LOWER_ORDER_FINAL = ("always", "short_runs", "last_two", "last_step", "never")
SPARED = {"last_two": {1: 1, 2: 2}, "last_step": {1: 1}}  # the highest order by the steps that are left
ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
SECOND = ("midpoint", "exact")
THIRD = ("exact", "halved")


def sample_dpm_solver(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    noise_sampler=None,
    order=2,
    lower_order_final="always",
    algorithm="dpmsolver++",
    second="midpoint",
    third="exact",
    noise_device="cpu",
    conventions=None,
):
    """Solve the probability-flow ODE with DPM-Solver++ multistep, or one of its kin.

    model(x, sigma, **extra_args) -> denoised. x: (B, C, H, W), variance exploding. sigmas: descending, >= 2 values.
    order: 1 to 3. lower_order_final: lower the order over the last steps "always" (PixArt-sigma), in runs of fewer than
        10 steps ("short_runs", PixArt-alpha), in the "last_two" or the "last_step" alone, or
        "never". A step to sigma 0 is always of first order.
    algorithm: "dpmsolver" interpolates the noise in place of the picture (arXiv 2206.00927); "sde-" solves the SDE.
    second: how the slope of two outputs is weighed, by the "midpoint" rule or "exact". third: how the curvature of
        three is, "exact" or "halved" as in the published code, which costs the third order.
    noise_sampler and noise_device: see sa_solver. conventions: limits and times of diffusers' schedulers (Conventions).
    Returns the latent at the last sigma.
    """
    levels = check_sigmas(sigmas)
    count = len(levels) - 1
    order = _check_order(order, lower_order_final, count)
    _check_rules(algorithm, second, third)
    lower = lower_order_final == "always" or (lower_order_final == "short_runs" and count < SHORT_RUN)
    last = steps_to_lower(levels)
    draw = noise_source(x, noise_sampler, extra_args, noise_device) if algorithm.startswith("sde") else None
    denoise = Denoiser(model, levels, extra_args, callback, conventions)
    step = _step_noise if algorithm.endswith("dpmsolver") else _step_picture
    history = []
    for i in steps(levels, disable):
        answer = denoise(x, i)
        history = [(x - answer) / levels[i] if step is _step_noise else answer, *history][:order]
        used = min(len(history), max(1, last - i)) if lower else len(history)
        if lower_order_final in SPARED:
            used = min(used, SPARED[lower_order_final].get(count - i, used))
        if levels[i + 1] == 0.0:
            return answer
        x = step(x, levels[max(0, i - used + 1) : i + 2], history[:used], (second, third), draw)
    return x


def _step_picture(x, levels, outputs, rules, draw):
    """One step from levels[-2] to levels[-1]; outputs: the model's, newest first, at levels[-2], levels[-3], ...

    rules: second and third. draw: makes noise, for the SDE.
    """
    source, target = levels[-2:]
    h = math.log(source / target)
    z, kept = (h, target / source) if draw is None else (2.0 * h, (target / source) ** 2)
    if len(outputs) == 1:
        x = x * kept - outputs[0] * math.expm1(-z)
    else:
        x = x * kept + _weighed(levels, outputs, moments(z, len(outputs)), rules)
    return x if draw is None else x + draw(source, target) * (target * math.sqrt(-math.expm1(-2.0 * h)))


def _step_noise(x, levels, outputs, rules, draw):
    """The same where the outputs are the noise that the model predicts."""
    source, target = levels[-2:]
    h = math.log(source / target)
    scale = target if draw is None else 2.0 * target
    x = x + scale * _weighed(levels, outputs, moments(-h, len(outputs)), rules)
    return x if draw is None else x + draw(source, target) * (target * math.sqrt(math.expm1(2.0 * h)))


def _weighed(levels, outputs, integrals, rules):
    """The integral of the interpolant of the outputs over a step, by the integrals of the powers of time."""
    source, target = levels[-2:]
    h = math.log(source / target)
    if len(outputs) == 2 and rules[0] == "midpoint":
        integrals[1] = 0.5 * integrals[0]
    if len(outputs) == 3 and rules[1] == "halved":
        integrals[2] *= 0.5
    weights = adams_weights([math.log(source / level) / h for level in levels[-2::-1]], integrals)
    # Around the newest output, whose weights add up to the first integral: less is cancelled.
    rest = zip(weights[1:], outputs[1:], strict=True)
    return integrals[0] * outputs[0] + sum(weight * (output - outputs[0]) for weight, output in rest)


def _check_rules(algorithm, second, third):
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"Unknown algorithm of DPM-Solver: got {reprlib.repr(algorithm)}, expected one of {', '.join(ALGORITHMS)}. "
            f"Choose dpmsolver++."
        )
    if second not in SECOND or third not in THIRD:
        raise ValueError(
            f"Unknown weights of DPM-Solver: got {reprlib.repr(second)} and {reprlib.repr(third)}, expected "
            f"{' or '.join(SECOND)} and {' or '.join(THIRD)}. Choose midpoint and exact."
        )


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
