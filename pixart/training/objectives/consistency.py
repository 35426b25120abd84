"""Latent consistency distillation: few steps without guidance."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...data.examples import Batch
from ...diffusion import TRAIN_STEPS, mean_over
from ...solvers import boundary_scalings
from ..adapters import AdaptedLinear, adapters_disabled
from ..draws import Draws
from .base import Loss, Objective, huber

DISTILLATION_HUBER_C = 1e-3


class Distillation(Objective):
    """Latent consistency distillation: one step of the student equals a guided step of the teacher and one after it.

    teacher, target: give the frozen model, and the slowly following one, as functions like the model's forward.
    Source: arXiv 2310.04378; for PixArt, arXiv 2401.05252.
    """

    highest_error = None  # of latents divided by alpha

    def __init__(self, model, settings, dtype, null_caption):
        super().__init__(model, settings, dtype, null_caption)
        self.stride = TRAIN_STEPS // settings.lcm_steps
        grid = torch.arange(1, settings.lcm_steps + 1) * self.stride - 1
        self.grid = grid[(grid >= settings.timestep_min) & (grid <= settings.timestep_max)]
        if not len(self.grid):
            raise ValueError(
                f"No LCM step in the timestep range: got {settings.timestep_min} to {settings.timestep_max}, expected "
                f"one of {grid[0]}, {grid[0] + self.stride}, ... in it. Widen the range."
            )

    @contextlib.contextmanager
    def as_teacher(self) -> Iterator[Callable[..., Tensor]]:
        """The frozen model within it."""
        raise NotImplementedError

    @contextlib.contextmanager
    def as_target(self) -> Iterator[Callable[..., Tensor]]:
        """The target model within it."""
        raise NotImplementedError

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        start, timestep = self.start(batch, draws), draws.timestep
        noisy = self.diffusion.q_sample(start, timestep, draws.noise)
        conditions = self.conditioned(batch, draws.dropped)
        predicted = self.consistent(self.model, noisy, timestep, conditions)
        with torch.no_grad():
            previous = self.teacher_step(noisy, timestep, batch, conditions)
            with self.as_target() as target:
                wanted = self.consistent(target, previous, self.previous_timestep(timestep), conditions)
        difference = predicted - wanted
        if self.settings.loss == "huber":
            loss = huber(difference, DISTILLATION_HUBER_C, scale=1.0, region=self.region(batch))
        else:
            loss = mean_over(difference.square(), self.region(batch))
        total = (self.importance(batch, self.weights[timestep]) * loss).mean()
        return Loss(total, total.detach(), each=loss.detach())

    def previous_timestep(self, timestep: Tensor) -> Tensor:
        """One DDIM step nearer to the picture, and 0 at the end."""
        return (timestep - self.stride).clamp(min=0)

    def predict_noise(self, model, noisy, timestep, conditions) -> Tensor:
        """(B, C, h, w) fp32."""
        return model(noisy.to(self.dtype), timestep.float(), **conditions)[:, : noisy.shape[1]].float()

    def consistent(self, model, noisy, timestep, conditions) -> Tensor:
        """The consistency function: the clean latent, and the noisy one itself at t = 0."""
        noise = self.predict_noise(model, noisy, timestep, conditions)
        c_skip, c_out = boundary_scalings(timestep[:, None, None, None].float())
        return c_skip * noisy + c_out * self.diffusion.predict_start(noisy, timestep, noise)

    def teacher_step(self, noisy, timestep, batch, conditions) -> Tensor:
        """The guided teacher's DDIM step from `timestep` to the one before."""
        empty = self.conditioned(batch, torch.ones_like(batch.is_prior))
        with self.as_teacher() as teacher:
            noises = [self.predict_noise(teacher, noisy, timestep, given) for given in (conditions, empty)]
        starts = [self.diffusion.predict_start(noisy, timestep, noise) for noise in noises]
        start, noise = (with_ + self.settings.lcm_guidance * (with_ - without) for with_, without in (starts, noises))
        return self.diffusion.q_sample(start, self.previous_timestep(timestep), noise)


class AdapterDistillation(Distillation):
    """LCM-LoRA: teacher and target are the model without and with its adapters. Source: arXiv 2311.05556."""

    def __init__(self, model, settings, dtype, null_caption, adapters: dict[str, AdaptedLinear]):
        super().__init__(model, settings, dtype, null_caption)
        self.adapters = adapters

    @contextlib.contextmanager
    def as_teacher(self):
        with adapters_disabled(self.adapters):
            yield self.model

    @contextlib.contextmanager
    def as_target(self):
        yield self.model


class FullDistillation(Distillation):
    """LCM of the whole model: the teacher stays, the target follows the student as a moving average.

    teacher: a frozen copy of the model in the dtype of the maths. target: another, in fp32.
    """

    def __init__(self, model, settings, dtype, null_caption, teacher: nn.Module, target: nn.Module):
        super().__init__(model, settings, dtype, null_caption)
        self.teacher, self.target = teacher, target

    @contextlib.contextmanager
    def as_teacher(self):
        yield self.teacher

    @contextlib.contextmanager
    def as_target(self):
        yield self.target

    @torch.no_grad()
    def finish_step(self):
        followers, leaders = list(self.target.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(followers, leaders, 1 - self.settings.lcm_decay)

    def extra_state(self):
        return {f"target.{name}": tensor for name, tensor in self.target.named_parameters()}
