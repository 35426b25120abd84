"""SA-Solver: stochastic Adams predictor-corrector, data prediction. Source: arXiv 2309.05019."""

import logging
import math
import reprlib
from dataclasses import dataclass

import torch

from .contract import Denoiser, check_sigmas, steps, steps_to_lower
from .exponential import adams_weights, moments
from .noise import noise_source
from .schedules import LAST_TIMESTEP, timesteps_from_sigmas

MAX_ORDER = 4
MODES = ("PEC", "PECE")
TAU_UNITS = ("timestep", "sigma", "percent")
# Where the two published implementations add noise: the first reads tau where a step ends, the second where it starts.
OFFICIAL_INTERVALS = {"target": (199.0, 799.0), "source": (200.0, 800.0)}
# A timestep recovered from a float32 sigma is off by up to 1.2e-5.
TIMESTEP_SLACK = 1e-3


def sample_sa_solver(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    noise_sampler=None,
    predictor_order=2,
    corrector_order=2,
    tau=1.0,
    tau_interval=None,
    tau_unit="timestep",
    tau_at="target",
    mode="PEC",
    few_steps=False,
    noise_device="cpu",
    conventions=None,
    correct_end=False,
):
    """Solve the variance-controlled diffusion SDE with SA-Solver; with tau 0 it is the probability-flow ODE.

    model(x, sigma, **extra_args) -> denoised. x: (B, C, H, W), variance exploding. sigmas: descending, >= 2 values.
    predictor_order: 1 to 4. corrector_order: 0 (no corrector) to 4. The first and last steps run at lower orders, and
        the last has no corrector.
    tau: amount of noise inside tau_interval, 0 outside. tau_interval: two bounds, inclusive, in tau_unit: "timestep"
        (0 to 999), "sigma" or "percent" (0 to 1 of the way from t = 999 to 0); None is the official one, t 200 to 800.
    tau_at: whether the interval is compared with the "target" of a step (the original sampler) or with its "source"
        (the original scheduler).
    mode: "PEC" evaluates the model once a step, "PECE" again after the corrector.
    few_steps: the paper's simplified second-order weights (appendix D), which the originals use; False is exact, and
        more accurate from about 8 steps on.
    noise_sampler(sigma, sigma_next) replaces the noise of noise_device ("cpu" or "gpu").
    conventions: limits and times of diffusers' schedulers (Conventions). correct_end: evaluate and correct
        once more at the last level, as diffusers does where its last two levels are one.
    Returns the latent at the last sigma.
    """
    levels = check_sigmas(sigmas)
    _check_options(predictor_order, corrector_order, mode, len(levels) - 1)
    last = len(levels) if correct_end else steps_to_lower(levels)
    taus = _tau_per_step(levels, tau, tau_interval, tau_unit, tau_at)
    draw = noise_source(x, noise_sampler, extra_args, noise_device)
    denoise = Denoiser(model, levels, extra_args, callback, conventions)
    step, source, outputs = None, x, []

    def corrected(x, predicted, i):
        order = min(corrector_order, i + 1, last - i + 2)
        return step.advance(source, levels[i::-1][:order], [predicted, *outputs][:order], few_steps)

    for i in steps(levels, disable):
        predicted = denoise(x, i)
        if step is not None and corrector_order:
            x = corrected(x, predicted, i)
            predicted = denoise.again(x, i) if mode == "PECE" else predicted
        outputs = [predicted, *outputs][:MAX_ORDER]
        order = min(predictor_order, i + 1, max(1, last - i))
        noise = draw(levels[i], levels[i + 1]) if taus[i] and levels[i + 1] else None
        step, source = _Step(levels[i], levels[i + 1], taus[i], noise), x
        x = step.advance(source, levels[i::-1][:order], outputs[:order], few_steps)
    if correct_end and corrector_order and levels[-1] > 0.0:
        x = corrected(x, denoise.again(x, len(levels) - 1), len(levels) - 1)
    return x


@dataclass(frozen=True)
class _Step:
    """One step between two noise levels. The corrector repeats it with the same noise and more outputs."""

    source: float
    target: float
    tau: float
    noise: torch.Tensor | None

    def advance(self, x, nodes, outputs, few_steps):
        """The latent at the target. x: at the source. outputs: the model's at the noise levels in nodes."""
        if self.target == 0.0:
            return outputs[0]
        h = math.log(self.source / self.target)
        z = (1.0 + self.tau**2) * h
        integrals = moments(z, len(nodes))
        if few_steps and len(nodes) == 2:
            integrals[1] = 0.5 * z
        weights = adams_weights([math.log(self.source / level) / h for level in nodes], integrals)
        x = x * (math.exp(-(self.tau**2) * h) * self.target / self.source)
        x = x + sum(weight * output for weight, output in zip(weights, outputs, strict=True))
        if self.noise is None:
            return x
        return x + self.noise * (self.target * math.sqrt(-math.expm1(-2.0 * self.tau**2 * h)))


def _tau_per_step(levels, tau, interval, unit, at):
    """The value of tau for each step."""
    if at not in OFFICIAL_INTERVALS:
        raise ValueError(f"Unknown tau_at: got {reprlib.repr(at)}, expected target or source. Choose target.")
    if tau < 0.0:
        raise ValueError(f"Tau is negative: got {tau}, expected 0 or more. Set tau to 1, or 0 for no noise.")
    low, high = OFFICIAL_INTERVALS[at] if interval is None else _interval_timesteps(interval, unit)
    times = timesteps_from_sigmas(levels[1:] if at == "target" else levels[:-1]).tolist()
    return [tau if low - TIMESTEP_SLACK <= t <= high + TIMESTEP_SLACK else 0.0 for t in times]


def _interval_timesteps(interval, unit):
    """The bounds of an interval as timesteps, the lower first."""
    if unit not in TAU_UNITS:
        raise ValueError(
            f"Unknown tau unit: got {reprlib.repr(unit)}, expected one of {', '.join(TAU_UNITS)}. Choose timestep."
        )
    if unit == "sigma":
        return sorted(timesteps_from_sigmas(interval).tolist())
    if unit == "percent":
        return sorted(LAST_TIMESTEP * (1.0 - bound) for bound in interval)
    return sorted(interval)


def _check_options(predictor_order, corrector_order, mode, count):
    if predictor_order not in range(1, MAX_ORDER + 1) or corrector_order not in range(MAX_ORDER + 1):
        raise ValueError(
            f"SA-Solver order is out of range: got predictor {predictor_order} and corrector {corrector_order}, "
            f"expected 1 to {MAX_ORDER} and 0 to {MAX_ORDER}. Set both to 2."
        )
    if mode not in MODES:
        raise ValueError(f"Unknown SA-Solver mode: got {reprlib.repr(mode)}, expected PEC or PECE. Choose PEC.")
    if max(predictor_order, corrector_order) > count:
        logging.warning(
            "SA-Solver of orders %d and %d has only %d steps; it runs at the orders they allow.",
            predictor_order,
            corrector_order,
            count,
        )
