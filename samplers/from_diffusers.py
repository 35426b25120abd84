"""What a diffusers scheduler_config.json asks for, as a solver of this pack, its options, and noise levels.

Source: diffusers, schedulers/scheduling_*.py. Formulas of timesteps are theirs; numbers are float64 on the CPU.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .schedules import BETA_END, BETA_START, LCM_ORIGIN_STEPS, NUM_TIMESTEPS, lcm_diffusers, sigmas

AS_THE_FOLDER_SAYS = "as the folder says"
STEPS, GUIDANCE = 20, 4.5  # the defaults of diffusers' PixArt pipelines
SHORT_RUN = 15  # below which lower_order_final lowers the order there
RHO = 7.0


@dataclass(frozen=True)
class _Class:
    """One class of schedulers. family: which formulas it spaces its timesteps by. defaults: of the keys it may lack."""

    sampler: str
    family: str
    options: dict = field(default_factory=dict)
    defaults: dict = field(default_factory=dict)
    remark: str = ""
    steps: int = STEPS
    guidance: float = GUIDANCE


_LCM_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_STAND_IN = "is not here; DPM-Solver++, which solves the same equation, is in its place"
_CLASSES = {
    "DPMSolverMultistepScheduler": _Class("dpm_solver", "multistep"),
    "SASolverScheduler": _Class(
        "sa_solver", "multistep", {"few_steps": True, "tau_at": "source"}, {"end": "sigma_min"}
    ),
    "LCMScheduler": _Class("lcm", "lcm", defaults={**_LCM_BETAS, "timestep_spacing": "leading"}, steps=4, guidance=1.0),
    "DDIMScheduler": _Class("ddim", "single", {"eta": 0.0}, {"timestep_spacing": "leading", "clip_sample": True}),
    "DDPMScheduler": _Class("ddim", "single", {"eta": 1.0}, {"timestep_spacing": "leading", "clip_sample": True}),
    "EulerDiscreteScheduler": _Class("ddim", "euler", {"eta": 0.0}),
    "EulerAncestralDiscreteScheduler": _Class("ddim", "euler", {"eta": 1.0}),
    "DPMSolverSinglestepScheduler": _Class("dpm_solver", "multistep", remark=_STAND_IN),
    "DEISMultistepScheduler": _Class("dpm_solver", "multistep", defaults={"end": "sigma_min"}, remark=_STAND_IN),
    "UniPCMultistepScheduler": _Class("dpm_solver", "multistep", remark=_STAND_IN),
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

    def options(self, steps: int) -> dict:
        """The solver's options for a run of so many steps."""
        kind, config = _CLASSES[self.name], self.config
        options = dict(kind.options)
        if kind.sampler == "dpm_solver":
            lowered = config["lower_order_final"] is not False and steps < SHORT_RUN
            options |= {"order": config["solver_order"], "lower_order_final": "always" if lowered else "never"}
        elif kind.sampler == "sa_solver":
            options |= {name: config[name] for name in ("predictor_order", "corrector_order")}
        return options

    def levels(self, steps: int, denoise: float = 1.0) -> torch.Tensor:
        """The noise levels of a run: (steps + 1,) float64. denoise: below 1 the last steps of a longer run."""
        if steps < 1 or not 0.0 < denoise <= 1.0:
            raise ValueError(
                f"Steps or denoise out of range: got {steps} and {denoise}, expected at least 1 step and a denoise of "
                f"more than 0 and at most 1. Correct them."
            )
        whole = min(max(steps, round(steps / denoise)), NUM_TIMESTEPS)
        family, config = _CLASSES[self.name].family, self.config
        times = lcm_diffusers(whole) if family == "lcm" else _times(family, config, whole)
        found = _respaced(sigmas(times), config, family)
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
    "algorithm_type": None,
    "solver_type": None,
    "original_inference_steps": LCM_ORIGIN_STEPS,
    "variance_type": None,
    "lambda_min_clipped": None,
    "end": "zero",
}


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
    ordinary = {
        "algorithm_type": (None, "dpmsolver++", "data_prediction"),
        "solver_type": (None, "midpoint") if kind.sampler == "dpm_solver" and not kind.remark else None,
        "thresholding": (False,),
        "clip_sample": (False,),
        "use_beta_sigmas": (False,),
        "use_lu_lambdas": (False,),
        "variance_type": (None, "fixed_small"),
        "lambda_min_clipped": (None, -math.inf, "-Infinity"),
    }
    for key, known in ordinary.items():
        if known is not None and config[key] not in known:
            yield f"{name}'s {key} {reprlib.repr(config[key])} is not done here"
    if kind.sampler == "dpm_solver" and config["solver_order"] == 3:
        yield f"{name}'s order 3 is approximate; here the same order is exact"
    if kind.family == "single" and config["timestep_spacing"] == "linspace":
        yield f"{name} steps past its own times where they are spaced by linspace; here each step ends at the next one"


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


def _respaced(levels: torch.Tensor, config: Mapping, family: str) -> torch.Tensor:
    """The levels spread again where the scheduler says so: of the whole table, or of what Euler's classes chose."""
    kind = next((kind for kind in ("karras", "exponential") if config[f"use_{kind}_sigmas"] is True), None)
    if kind is None or family not in ("multistep", "euler"):
        return levels
    first, last = (levels[0], levels[-1]) if family == "euler" else sigmas([NUM_TIMESTEPS - 1.0, 0.0])
    ramp = torch.linspace(0.0, 1.0, len(levels), dtype=torch.float64)
    if kind == "exponential":
        return torch.lerp(first.log(), last.log(), ramp).exp()
    return torch.lerp(first ** (1 / RHO), last ** (1 / RHO), ramp) ** RHO
