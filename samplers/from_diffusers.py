"""What a diffusers scheduler_config.json asks for, as a solver of this pack, its options, and noise levels.

Source: diffusers, schedulers/scheduling_*.py. Formulas of timesteps are theirs; numbers are float64 on the CPU.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .conventions import Conventions
from .dpm_solver import ALGORITHMS, MAX_ORDER
from .schedules import BETA_END, BETA_START, LCM_ORIGIN_STEPS, NUM_TIMESTEPS, lcm_diffusers, sigmas

AS_THE_FOLDER_SAYS = "as the folder says"
STEPS, GUIDANCE = 20, 4.5  # the defaults of diffusers' PixArt pipelines
SHORT_RUN = 15  # below which lower_order_final lowers the order there
RHO = 7.0


@dataclass(frozen=True)
class _Class:
    """One class of schedulers. family: which formulas it spaces its timesteps by. defaults: of the keys it may lack.

    spreads: which of its levels' spreadings it knows.
    """

    sampler: str
    family: str
    options: dict = field(default_factory=dict)
    defaults: dict = field(default_factory=dict)
    remark: str = ""
    steps: int = STEPS
    guidance: float = GUIDANCE
    spreads: tuple[str, ...] = ()


_MOST = ("karras_sigmas", "exponential_sigmas", "beta_sigmas")  # how levels may be spread again
_LCM_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_STAND_IN = "is not here; DPM-Solver++, which solves the same equation, is in its place"
_CLASSES = {
    "DPMSolverMultistepScheduler": _Class("dpm_solver", "multistep", spreads=(*_MOST, "lu_lambdas")),
    "SASolverScheduler": _Class(
        "sa_solver", "multistep", {"few_steps": True, "tau_at": "source"}, {"end": "sigma_min"}, spreads=_MOST
    ),
    "LCMScheduler": _Class("lcm", "lcm", defaults={**_LCM_BETAS, "timestep_spacing": "leading"}, steps=4, guidance=1.0),
    "DDIMScheduler": _Class("ddim", "single", {"eta": 0.0}, {"timestep_spacing": "leading", "clip_sample": True}),
    "DDPMScheduler": _Class("ddim", "single", {"eta": 1.0}, {"timestep_spacing": "leading", "clip_sample": True}),
    "EulerDiscreteScheduler": _Class("ddim", "euler", {"eta": 0.0}, spreads=_MOST),
    "EulerAncestralDiscreteScheduler": _Class("ddim", "euler", {"eta": 1.0}),
    "DPMSolverSinglestepScheduler": _Class("dpm_solver", "multistep", remark=_STAND_IN, spreads=_MOST),
    "DEISMultistepScheduler": _Class(
        "dpm_solver", "multistep", defaults={"end": "sigma_min"}, remark=_STAND_IN, spreads=_MOST
    ),
    "UniPCMultistepScheduler": _Class("dpm_solver", "multistep", remark=_STAND_IN, spreads=_MOST),
    "PNDMScheduler": _Class("dpm_solver", "multistep", defaults={"timestep_spacing": "leading"}, remark=_STAND_IN),
    "HeunDiscreteScheduler": _Class("dpm_solver", "multistep", defaults=_LCM_BETAS, remark=_STAND_IN),
}


@dataclass(frozen=True)
class Asked:
    """What a scheduler asks for. name: its class. remarks: what is not honoured. steps, guidance: the usual ones."""

    name: str
    sampler: str
    steps: int
    guidance: float
    remarks: tuple[str, ...]
    config: Mapping

    def options(self, steps: int, denoise: float = 1.0) -> dict:
        """The solver's options for a run of so many steps. denoise: see levels."""
        kind, config = _CLASSES[self.name], self.config
        options = {**kind.options, "conventions": _conventions(kind, config)}
        whole = _whole_run(steps, denoise)
        if kind.sampler == "dpm_solver":
            return options | _dpm_options(config, whole)
        if kind.sampler == "sa_solver":
            options |= {name: config[name] for name in ("predictor_order", "corrector_order")}
            options["correct_end"] = _spread(kind, config) is not None
        if self.name == "DDIMScheduler":
            options["stride"] = NUM_TIMESTEPS // whole
        return options

    def levels(self, steps: int, denoise: float = 1.0) -> torch.Tensor:
        """The noise levels of a run: (steps + 1,) float64. denoise: below 1 the last steps of a longer run."""
        if steps < 1 or not 0.0 < denoise <= 1.0:
            raise ValueError(
                f"Steps or denoise out of range: got {steps} and {denoise}, expected at least 1 step and a denoise of "
                f"more than 0 and at most 1. Correct them."
            )
        whole = _whole_run(steps, denoise)
        kind, config = _CLASSES[self.name], self.config
        times = lcm_diffusers(whole) if kind.family == "lcm" else _times(kind.family, config, whole)
        found = _respaced(_between(times) if kind.family == "euler" else sigmas(times), kind, config)
        last = sigmas(0.0).reshape(1) if config["end"] == "sigma_min" else found.new_zeros(1)
        return torch.cat([found, last])[-steps - 1 :]

    def __str__(self) -> str:
        guidance = "off" if self.guidance <= 1.0 else f"{self.guidance:g}"
        return f"{self.name}: {self.sampler}, {self.steps} steps, guidance {guidance}"


def read_scheduler(config: Mapping) -> Asked:
    """What a scheduler_config.json asks for.

    Raises ValueError for another diffusion than the one PixArt is trained with (betas, v-prediction, flow matching),
    for a class that is not known, and for numbers that are none.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _CLASSES:
        raise ValueError(
            f"Unknown scheduler: got {reprlib.repr(name)}, expected one of {', '.join(_CLASSES)}. Choose a preset or a "
            f"solver of this pack."
        )
    kind = _CLASSES[name]
    filled = {**_DEFAULTS, **kind.defaults}
    filled |= {key: config[key] for key in filled if config.get(key) is not None}
    if "end" not in kind.defaults:
        at_start = config.get("set_alpha_to_one") is False or config.get("final_sigmas_type") == "sigma_min"
        filled["end"] = "sigma_min" if at_start else "zero"
    _require_pixart(name, filled)
    _require_counts(filled)
    _require_limits(filled)
    return Asked(name, kind.sampler, kind.steps, kind.guidance, tuple(_remarks(name, kind, filled)), filled)


_DEFAULTS = {
    "num_train_timesteps": NUM_TIMESTEPS,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "solver_order": 2,
    "predictor_order": 2,
    "corrector_order": 2,
    "lower_order_final": True,
    "clip_sample": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "clip_sample_range": 1.0,
    "euler_at_final": False,
    "interpolation_type": "linear",
    "sigma_min": None,
    "sigma_max": None,
    "algorithm_type": None,
    "solver_type": None,
    "original_inference_steps": LCM_ORIGIN_STEPS,
    "variance_type": None,
    "lambda_min_clipped": None,
    "end": "zero",
}


def _whole_run(steps: int, denoise: float) -> int:
    """The steps of the run of which these are the last."""
    return min(max(steps, round(steps / denoise)), NUM_TIMESTEPS)


def _spread(kind: _Class, config: Mapping) -> str | None:
    """How the levels are spread again, None where they are those of the times."""
    return next((name for name in kind.spreads if config[f"use_{name}"] is True), None)


def _conventions(kind: _Class, config: Mapping) -> Conventions:
    """At which times the model is asked, and what of its answer is kept."""
    spread = _spread(kind, config)
    if spread is None:
        times = "linear" if kind.family == "euler" else "exact"
    elif kind.family == "euler":
        times = "log_sigma"
    else:
        times = "rounded" if spread in ("karras_sigmas", "lu_lambdas") else "floored"
    if config["thresholding"] is True and kind.family != "euler":
        return Conventions(times, threshold=(config["dynamic_thresholding_ratio"], config["sample_max_value"]))
    clips = config["clip_sample"] is True and kind.family in ("single", "lcm")
    return Conventions(times, clip=config["clip_sample_range"] if clips else None)


def _dpm_options(config: Mapping, steps: int) -> dict:
    """What a DPM-Solver is asked for: its order, where that is lowered, its algorithm."""
    algorithm = config["algorithm_type"] if config["algorithm_type"] in ALGORITHMS else ALGORITHMS[0]
    order = min(config["solver_order"], 2 if algorithm.startswith("sde") else MAX_ORDER)
    lower = "never"
    if config["lower_order_final"] is not False and steps < SHORT_RUN:
        lower = "last_two"
    elif config["euler_at_final"] is True:
        lower = "last_step"
    second = "exact" if config["solver_type"] == "heun" else "midpoint"
    return {"order": order, "lower_order_final": lower, "algorithm": algorithm, "second": second, "third": "halved"}


def _require_pixart(name: str, config: Mapping) -> None:
    """Raises ValueError for a diffusion whose noise or prediction is not PixArt's."""
    own = {
        "num_train_timesteps": NUM_TIMESTEPS, "beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "linear",
        "trained_betas": None, "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "use_flow_sigmas": False,
    }  # fmt: skip
    for key, expected in own.items():
        if config[key] != expected:
            raise ValueError(
                f"Another diffusion: got {key} {reprlib.repr(config[key])} in the folder's {name}, expected {expected} "
                f"as PixArt is trained. Choose a preset or a solver of this pack if the model is an ordinary PixArt; "
                f"one that was trained so cannot be sampled here."
            )


def _require_limits(config: Mapping) -> None:
    """Raises ValueError where a limit of the picture is none."""
    limits = {
        "dynamic_thresholding_ratio": (0.0, 1.0),
        "sample_max_value": (1.0, 1e6),
        "clip_sample_range": (1e-6, 1e6),
    }
    for key, (least, most) in limits.items():
        if type(config[key]) not in (int, float) or not least <= config[key] <= most:
            raise ValueError(
                f"Unusable scheduler: got {key} {reprlib.repr(config[key])}, expected {least:g} to {most:g}. Correct "
                f"scheduler_config.json, or choose a preset."
            )


def _require_counts(config: Mapping) -> None:
    """Raises ValueError where a count or a spacing is none."""
    counts = {"solver_order": (1, 3), "predictor_order": (1, 4), "corrector_order": (0, 4), "steps_offset": (0, 10)}
    for key, (least, most) in counts.items():
        if type(config[key]) is not int or not least <= config[key] <= most:
            raise ValueError(
                f"Unusable scheduler: got {key} {reprlib.repr(config[key])}, expected {least} to {most}. Correct "
                f"scheduler_config.json, or choose a preset."
            )
    if config["timestep_spacing"] not in ("linspace", "leading", "trailing"):
        raise ValueError(
            f"Unusable scheduler: got timestep_spacing {reprlib.repr(config['timestep_spacing'])}, expected linspace, "
            f"leading or trailing. Correct scheduler_config.json, or choose a preset."
        )
    if config["original_inference_steps"] != LCM_ORIGIN_STEPS:
        raise ValueError(
            f"Another LCM: got original_inference_steps {reprlib.repr(config['original_inference_steps'])}, expected "
            f"{LCM_ORIGIN_STEPS}. Choose a preset or a solver of this pack."
        )


def _remarks(name: str, kind: _Class, config: Mapping):
    """What the pack's solver does otherwise, one sentence each."""
    if kind.remark:
        yield f"{name} {kind.remark}"
    is_dpm, is_euler = name == "DPMSolverMultistepScheduler", kind.family == "euler"
    ordinary = {
        "algorithm_type": (None, "data_prediction", *(ALGORITHMS if is_dpm else ALGORITHMS[:1])),
        "solver_type": (None, "midpoint", "heun", "logrho", "bh1", "bh2") if is_dpm else None,
        "thresholding": (False,) if is_euler else None,
        "use_lu_lambdas": (False,) if "lu_lambdas" not in kind.spreads and kind.spreads else None,
        "variance_type": (None, "fixed_small", "fixed_small_log"),
        "lambda_min_clipped": (None, -math.inf, "-Infinity"),
        "lower_order_final": (True,) if kind.sampler == "sa_solver" else None,
        "interpolation_type": ("linear",) if is_euler else None,
        "sigma_min": (None,) if kind.spreads else None,
        "sigma_max": (None,) if kind.spreads else None,
    }
    for key, known in ordinary.items():
        if known is not None and config[key] not in known:
            yield f"{name}'s {key} {reprlib.repr(config[key])} is not done here"
    if is_dpm and config["solver_order"] == MAX_ORDER and str(config["algorithm_type"]).startswith("sde"):
        yield f"{name}'s order 3 is not done here for {config['algorithm_type']}; order 2 is in its place"
    for key in ("clip_sample", "thresholding"):
        if config[key] is True and (kind.family in ("single", "lcm") or (key == "thresholding" and not is_euler)):
            yield f"{name}'s {key} True holds latents to the range of pixels, as diffusers does; false keeps them whole"


def _times(family: str, config: Mapping, steps: int) -> torch.Tensor:
    """The timesteps of the evaluations, descending, as the classes of a family space them."""
    spacing, offset = config["timestep_spacing"], config["steps_offset"]
    extra = family == "multistep"  # these space one more time, and drop the lowest
    if spacing == "trailing":
        times = NUM_TIMESTEPS - torch.arange(steps, dtype=torch.float64) * (NUM_TIMESTEPS / steps)
        return times.round() - 1.0
    if spacing == "leading":
        stride = NUM_TIMESTEPS // (steps + extra)
        times = torch.arange(steps + extra, dtype=torch.float64) * max(stride, 1) + offset
        return times.flip(0)[:steps].clamp(max=NUM_TIMESTEPS - 1)
    if steps == NUM_TIMESTEPS:  # rounding would give one time twice
        return torch.arange(NUM_TIMESTEPS, dtype=torch.float64).flip(0)
    times = torch.linspace(0.0, NUM_TIMESTEPS - 1.0, steps + extra, dtype=torch.float64).flip(0)[:steps]
    return times if family == "euler" else times.round()


def _between(times: torch.Tensor) -> torch.Tensor:
    """The levels at times between the table's, by straight lines as Euler's classes draw them."""
    low = times.floor()
    return torch.lerp(sigmas(low), sigmas(low + 1.0), times - low)


def _respaced(levels: torch.Tensor, kind: _Class, config: Mapping) -> torch.Tensor:
    """The levels spread again where the scheduler says so: of the whole table, or of what Euler's classes chose."""
    spread = _spread(kind, config)
    if spread is None:
        return levels
    first, last = (levels[0], levels[-1]) if kind.family == "euler" else sigmas([NUM_TIMESTEPS - 1.0, 0.0])
    ramp = torch.linspace(0.0, 1.0, len(levels), dtype=torch.float64)
    if spread == "beta_sigmas":
        return torch.lerp(last, first, _beta_quantiles(1.0 - ramp))
    if spread != "karras_sigmas":  # exponential and Lu's are one formula
        return torch.lerp(first.log(), last.log(), ramp).exp()
    return torch.lerp(first ** (1 / RHO), last ** (1 / RHO), ramp) ** RHO


def _beta_quantiles(shares: torch.Tensor) -> torch.Tensor:
    """Where a beta distribution of 0.6 and 0.6 has these shares below. Source: arXiv 2407.12173."""
    try:
        from scipy.stats import beta  # as ComfyUI brings it
    except ImportError as error:
        raise ValueError(
            "No scipy: got a scheduler with use_beta_sigmas, expected the package scipy. Install it with: pip install "
            "scipy"
        ) from error
    return torch.from_numpy(beta.ppf(shares.numpy(), 0.6, 0.6))
