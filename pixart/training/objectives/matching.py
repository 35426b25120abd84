"""Distribution matching distillation (DMD): one step without guidance, as PixArt-alpha-DMD was made."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...data.examples import Batch
from ...diffusion import TRAIN_STEPS
from ...solvers import DMD_TIMESTEP
from ..adapters import AdaptedLinear, adapters_disabled
from ..draws import Draws
from .base import Loss, Objective, huber

# Noise levels at which the two scores are compared, of all: at the ends they say nothing.
FIRST_SHARE, LAST_SHARE = 0.02, 0.98
_LEAST_WEIGHT = 1e-4  # of the mean distance that a gradient is divided by


class DistributionMatching(Objective):
    """The generator's pictures are moved along the difference of two scores, until both say the same of them.

    model: the generator, one step from noise at t = 400. fake: follows the generator's pictures by noise prediction,
    and is trained beside it. fake_adapters, adapters: the LoRAs of either, empty where its weights are trained.
    teacher: the frozen model that knows the real pictures; None where one of the two is that model without its LoRA.
    Where the batch has the noises of its latents (see data.pairs), the generator's pictures of those are held to them.
    One noised picture serves both the comparison and the training of `fake`, whose pass is then made once.
    Source: arXiv 2311.18828; for PixArt, PixArt-Sigma's repository, train_dmd.
    """

    def __init__(
        self,
        model,
        settings,
        dtype,
        null_caption,
        fake: nn.Module,
        fake_adapters: dict[str, AdaptedLinear],
        adapters: dict[str, AdaptedLinear],
        teacher: nn.Module | None = None,
    ):
        super().__init__(model, settings, dtype, null_caption)
        self.fake, self.teacher = fake, teacher
        self.fake_adapters, self.adapters = fake_adapters, adapters
        grid = torch.arange(round(FIRST_SHARE * TRAIN_STEPS), round(LAST_SHARE * TRAIN_STEPS))
        self.grid = grid[(grid >= settings.timestep_min) & (grid <= settings.timestep_max)]
        if not len(self.grid):
            raise ValueError(
                f"No noise level to compare at: got timesteps {settings.timestep_min} to {settings.timestep_max}, "
                f"expected some from {grid[0]} to {grid[-1]}. Widen the range."
            )

    @contextlib.contextmanager
    def as_teacher(self) -> Iterator[Callable[..., Tensor]]:
        """The frozen model within it."""
        if self.teacher is not None:
            yield self.teacher
        elif self.fake_adapters:
            with adapters_disabled(self.fake_adapters):
                yield self.fake
        else:
            with adapters_disabled(self.adapters):
                yield self.model

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        conditions = self.conditioned(batch, draws.dropped)
        is_held = batch.noise is not None and self.settings.dmd_regression > 0
        noise = torch.cat([draws.noise, batch.noise.float()]) if is_held else draws.noise
        twice = {name: _repeat(value, len(noise) // len(batch)) for name, value in conditions.items()}
        generated, *held = self.generate(noise, twice).split(len(batch))
        matching, fake_error = self.match(generated, batch, draws, conditions)
        total = matching + fake_error
        if is_held:
            total = total + self.settings.dmd_regression * self.distance(held[0], self.start(batch, draws))
        return Loss(total, fake_error.detach())

    def generate(self, noise: Tensor, conditions) -> Tensor:
        """The generator's pictures of noise (B, C, h, w) of unit variance, as clean scaled latents in fp32."""
        timestep = torch.full((len(noise),), int(DMD_TIMESTEP), device=noise.device)
        return self.diffusion.predict_start(
            noise, timestep, self.predict_noise(self.model, noise, timestep, conditions)
        )

    def match(self, generated: Tensor, batch: Batch, draws: Draws, conditions) -> tuple[Tensor, Tensor]:
        """(the loss whose gradient is the difference of the scores, the error of the fake score)."""
        timestep, noise = draws.timestep, draws.posterior_noise
        noisy = self.diffusion.q_sample(generated.detach(), timestep, noise)
        fake_noise = self.predict_fake(noisy, timestep, conditions)
        with torch.no_grad():
            fake = self.diffusion.predict_start(noisy, timestep, fake_noise)
            real = self.diffusion.predict_start(noisy, timestep, self.teach(noisy, timestep, batch, conditions))
            weight = (generated - real).abs().flatten(1).mean(1).clamp(min=_LEAST_WEIGHT)
            difference = self.weights[timestep][:, None, None, None] * (fake - real) / weight[:, None, None, None]
        matching = 0.5 * (generated - (generated - difference).detach()).square().mean()
        return matching, (fake_noise - noise).square().mean()

    def predict_noise(self, model, noisy, timestep, conditions) -> Tensor:
        """(B, C, h, w) fp32."""
        return model(noisy.to(self.dtype), timestep.float(), **conditions)[:, : noisy.shape[1]].float()

    def predict_fake(self, noisy, timestep, conditions) -> Tensor:
        """What the fake score says, (B, C, h, w) fp32. Its LoRA casts by itself, whatever the generator needs."""
        is_cast = self.autocast and not self.fake_adapters
        with torch.autocast(noisy.device.type, self.dtype, enabled=is_cast):
            return self.predict_noise(self.fake, noisy, timestep, conditions)

    def teach(self, noisy, timestep, batch, conditions) -> Tensor:
        """The noise that the guided teacher predicts, (B, C, h, w) fp32."""
        empty = self.conditioned(batch, torch.ones_like(batch.is_prior))
        with self.as_teacher() as teacher, torch.autocast(noisy.device.type, self.dtype, enabled=False):
            with_ = self.predict_noise(teacher, noisy, timestep, conditions)
            if self.settings.dmd_guidance == 1:
                return with_
            without = self.predict_noise(teacher, noisy, timestep, empty)
        return without + self.settings.dmd_guidance * (with_ - without)

    def distance(self, generated: Tensor, wanted: Tensor) -> Tensor:
        """How far the generator's pictures are from the teacher's of the same noise: the mean over the batch."""
        if self.settings.loss == "huber":
            return huber(generated - wanted, self.settings.huber_c).mean()
        return (generated - wanted).square().mean()


def _repeat(value: Tensor | None, times: int) -> Tensor | None:
    return value if value is None or times == 1 else torch.cat([value] * times)
