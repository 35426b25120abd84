"""Optimisers by name, the course of the learning rate, and the moving average of the weights."""

import contextlib
import importlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..quoting import plain, shorten
from .settings import TrainingSettings

# Name -> (package to install, module, class, arguments beside learning rate and weight decay).
_LIBRARIES = {
    "adamw8bit": ("bitsandbytes", "bitsandbytes.optim", "AdamW8bit", {}),
    "came": ("came-pytorch", "came_pytorch", "CAME", {"betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16)}),
    "prodigy": ("prodigyopt", "prodigyopt", "Prodigy", {"safeguard_warmup": True, "use_bias_correction": True}),
    "lion": ("lion-pytorch", "lion_pytorch", "Lion", {"decoupled_weight_decay": True}),
    "schedulefree": ("schedulefree", "schedulefree", "AdamWScheduleFree", {}),
}
_PACKED_FROM = 4096  # numbers that bitsandbytes keeps in 8 bits; the states of smaller weights stay in 32


RATE_FACTOR = "rate_factor"  # of a group of parameters, beside the schedule's
_RAISED = ".lora_up"  # LoRA's B


def make_optimizer(settings: TrainingSettings, named: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """The optimiser that the settings name, in training mode. Raises ValueError for a library that is missing.

    With a lora_plus other than 1 there are two groups of parameters. Source: LoRA+, arXiv 2402.12354.
    """
    parameters = list(named.values())
    made = _make(settings, parameters, _grouped(settings, named))
    if hasattr(made, "train"):  # one that holds an average in place of the weights unless it trains
        made.train()
    return made


def _grouped(settings, named: Mapping[str, Tensor]) -> list:
    if settings.lora_plus == 1:
        return list(named.values())
    raised = [parameter for name, parameter in named.items() if name.endswith(_RAISED)]
    others = [parameter for name, parameter in named.items() if not name.endswith(_RAISED)]
    groups = [{"params": others}, {"params": raised, RATE_FACTOR: settings.lora_plus}]
    return [{**group, "lr": settings.learning_rate * group.get(RATE_FACTOR, 1)} for group in groups]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let all parameters follow this learning rate, those of LoRA+ its multiple."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_FACTOR, 1)


@contextlib.contextmanager
def as_result(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it the parameters are what the optimiser gives as the result of the training; after it as before, exactly.

    That is the average of schedule-free methods; elsewhere nothing changes. Source: arXiv 2405.15682.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = [parameter.detach().clone() for parameter in parameters]  # the way back would round
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            torch._foreach_copy_(parameters, own)


def _make(settings, parameters: list[Tensor], grouped: list) -> torch.optim.Optimizer:
    common = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(grouped, fused=_can_fuse(parameters), **common)
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(grouped, **common)
    package, module, name, options = _LIBRARIES[settings.optimizer]
    try:
        library = importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"Optimiser is not installed: got {shorten(settings.optimizer)}, expected the package {package} "
            f"({shorten(error, 200)}). Install it with pip into ComfyUI's Python, or choose adamw."
        ) from error
    if settings.optimizer == "adamw8bit":
        _check_8bit(getattr(library, name), parameters)
    return getattr(library, name)(grouped, **common, **options)


def _check_8bit(optimizer: type, parameters: list[Tensor]) -> None:
    """Raises ValueError where the library has no kernels for the device, which it says only at the first step."""
    device = parameters[0].device
    trial = torch.nn.Parameter(torch.zeros(_PACKED_FROM, device=device))
    trial.grad = torch.zeros_like(trial)
    try:
        optimizer([trial]).step()
    except (RuntimeError, NotImplementedError, AttributeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"8-bit Adam does not work here: got "
            f"{plain((str(error).splitlines() or [type(error).__name__])[0], 200)} from bitsandbytes on "
            f"the device '{device.type}', expected its kernels for it. Install a newer bitsandbytes, or choose adamw."
        ) from error


def _can_fuse(parameters) -> bool:
    return all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in parameters)


def rate_factor(settings: TrainingSettings, step: int) -> float:
    """The factor of the learning rate in optimiser step number `step`, counted from 0."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    course = max(settings.steps - settings.warmup_steps, 1)
    progress = min((step - settings.warmup_steps) / course, 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress
    return settings.floor + (1 - settings.floor) * share


class MovingAverage:
    """A moving average of parameters in fp32, with a shorter memory over the first updates."""

    def __init__(self, parameters: dict[str, Tensor], decay: float):
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.shadow = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the parameters by one step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within it the parameters hold their averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        for name, parameter in self.parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(own)

    @torch.no_grad()
    def copy_to(self, parameters: dict[str, Tensor]) -> None:
        """Write the averages into other parameters of the same names."""
        for name, value in self.shadow.items():
            parameters[name].copy_(value)

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.updates = state["updates"]
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)
