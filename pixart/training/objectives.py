"""What is minimised: noise prediction, ControlNet, and consistency distillation. One small class each.

An objective is a module: its forward takes a Batch and its Draws and gives the loss to minimise and, beside it,
numbers to report. Its parameters that require gradients are what is trained.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from ..data.examples import Batch
from ..diffusion import TRAIN_STEPS, Diffusion
from ..solvers import boundary_scalings
from ..transformer import PixArt
from .adapters import AdaptedLinear, adapters_disabled
from .draws import Draws
from .settings import TrainingSettings

VELOCITY_LIMIT = 200.0  # largest weight of a timestep when all velocities weigh the same
DISTILLATION_HUBER_C = 1e-3
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
Conditions = dict[str, Tensor | None]  # keyword arguments of the model


class Loss(NamedTuple):
    """total: to minimise. error: what shows whether the training is sane. bound: of the learned variance, or None."""

    total: Tensor
    error: Tensor
    bound: Tensor | None = None


class Objective(nn.Module):
    """What all objectives share: the model's inputs out of a batch, and the null caption.

    model: the PixArt that is called. dtype: of the maths. null_caption: (L, D) T5 states of the empty caption, used
    where the model has no learned one.
    highest_error: the error of a sane model stays below it; None where errors have no fixed scale.
    autocast: whether weights are trained that are fp32 under maths in another dtype; adapters cast themselves.
    """

    highest_error: float | None = 4.0  # predicting nothing at all gives 1
    grid: Tensor | None = None  # the timesteps to draw from; None is all

    def __init__(self, model: PixArt, settings: TrainingSettings, dtype: torch.dtype, null_caption: Tensor | None):
        super().__init__()
        self.model, self.settings, self.dtype = model, settings, dtype
        self.vae_scale = model.config.vae_scale
        self.null_caption = _null_caption(model, null_caption)
        if self.null_caption is None and (settings.caption_dropout or settings.kind in ("lcm", "lcm_lora")):
            raise ValueError(
                "No null caption: got a model without a learned one and a dataset without the empty caption's states, "
                "expected one of them. Load the original .pth, encode the dataset again, or set caption dropout to 0."
            )
        device = next(model.parameters()).device
        self.diffusion = Diffusion().to(device)
        self.weights = timestep_weights(settings, Diffusion().alphas_cumprod).to(device)

    def start(self, batch: Batch, draws: Draws) -> Tensor:
        """Clean latents as the model knows them: scaled, and sampled where their deviation is known. fp32."""
        latent = batch.latent.float()
        if batch.deviation is not None:
            latent = latent + batch.deviation.float() * draws.posterior_noise
        return latent * self.vae_scale

    def conditioned(self, batch: Batch, dropped: Tensor) -> Conditions:
        """The keyword arguments of the model but latent and timestep. dropped: (B,) rows without their caption."""
        caption, mask = batch.caption.to(self.dtype), batch.caption_mask
        own_mask = False
        if self.null_caption is not None:
            caption, mask = replace_captions(caption, mask, dropped, *self.null_caption)
            own_mask = not self.null_caption[1]
        if len(caption) == 1 and not own_mask:
            mask = None  # a caption alone has no padding, and attention without a mask is faster
        size = {"resolution": batch.resolution, "aspect_ratio": batch.aspect_ratio}
        return {"caption": caption, "caption_mask": mask, **size}

    @property
    def autocast(self) -> bool:
        """See above."""
        return not self.settings.is_adapter and self.dtype != torch.float32

    def without_caption(self, caption: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The null caption in place of captions (B, L, D) and their masks (B, L)."""
        every = torch.ones(len(caption), dtype=torch.bool, device=caption.device)
        return replace_captions(caption, mask, every, *self.null_caption)

    def within(self, function: Callable, *arguments):
        """function(*arguments), which calls parts of this module; where weights are sharded they are whole in it."""
        return function(*arguments)

    def finish_step(self) -> None:
        """Called after each optimiser step."""

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors beside the trained parameters that a continued run needs."""
        return {}


class NoisePrediction(Objective):
    """PixArt's own training: predict the noise, and the variance when train_variance.

    Source: PixArt-alpha, arXiv 2310.00426; prior preservation: DreamBooth, arXiv 2208.12242.
    """

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        start = self.start(batch, draws)
        noisy = self.diffusion.q_sample(start, draws.timestep, draws.noise)
        inputs = noisy.to(self.dtype), draws.timestep.float(), self.conditioned(batch, draws.dropped)
        target = self.target(*inputs, batch, draws)
        prediction = self.predict(*inputs, batch)
        return self.compare(prediction.float(), target, start, noisy, batch, draws.timestep)

    def target(self, noisy: Tensor, timestep: Tensor, conditions: Conditions, batch: Batch, draws: Draws) -> Tensor:
        """The noise that is to be predicted, (B, C, h, w) fp32."""
        return draws.noise

    def predict(self, noisy: Tensor, timestep: Tensor, conditions: Conditions, batch: Batch) -> Tensor:
        """The model's output, (B, C_out, h, w)."""
        return self.model(noisy, timestep, **conditions)

    def compare(
        self, prediction: Tensor, noise: Tensor, start: Tensor, noisy: Tensor, batch: Batch, timestep: Tensor
    ) -> Loss:
        """The weighted mean over the batch. prediction: (B, C or 2C, h, w) fp32; noise: what it should be."""
        settings = self.settings
        if not settings.train_variance:
            prediction = prediction[:, : start.shape[1]]
        losses = self.diffusion.training_losses(prediction, start, noisy, timestep, noise)
        main, bound = losses["mse"], losses.get("vb")
        if settings.loss == "huber":
            main = huber(prediction[:, : start.shape[1]] - noise, settings.huber_c)
        total = self.weights[timestep] * main
        if bound is not None:
            total = total + bound
        importance = torch.where(batch.is_prior, settings.prior_weight, 1.0)
        return Loss((importance * total).mean(), losses["mse"].mean(), None if bound is None else bound.mean())


class PreservingPrediction(NoisePrediction):
    """Noise prediction in which the adapters may not change what the model predicts for prior pictures.

    The frozen model's own prediction has no chance in it, as the noise has, and is met exactly at the start.
    """

    def __init__(self, model, settings, dtype, null_caption, adapters: dict[str, AdaptedLinear]):
        super().__init__(model, settings, dtype, null_caption)
        self.adapters = adapters

    @torch.no_grad()
    def target(self, noisy, timestep, conditions, batch, draws):
        rows = batch.is_prior.nonzero()[:, 0]
        if not len(rows) and not (distributed.is_available() and distributed.is_initialized()):
            return draws.noise
        asked = rows if len(rows) else rows.new_zeros(1)  # all processes gather sharded weights, or none may
        conditions = {name: None if value is None else value[asked] for name, value in conditions.items()}
        with adapters_disabled(self.adapters):
            own = self.model(noisy[asked], timestep[asked], **conditions)
        return draws.noise.index_copy(0, rows, own[: len(rows), : noisy.shape[1]].float())


class ControlPrediction(NoisePrediction):
    """Noise prediction through a frozen base with a trained ControlNet. Source: PixArt-delta, arXiv 2401.05252."""

    def __init__(self, model, settings, dtype, null_caption, control: nn.Module):
        super().__init__(model, settings, dtype, null_caption)
        self.control = control

    def predict(self, noisy, timestep, conditions, batch):
        if batch.hint is None:
            raise ValueError(
                "Control pictures are missing: got a dataset without them, expected one for each picture. Encode the "
                "dataset with control pictures."
            )
        hint = (batch.hint.float() * self.vae_scale).to(self.dtype)
        return self.model(noisy, timestep, control=self.control.attach(self.model, hint), **conditions)


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
        loss = huber(difference, DISTILLATION_HUBER_C, scale=1.0) if self.settings.loss == "huber" else None
        loss = difference.square().flatten(1).mean(1) if loss is None else loss
        total = (self.weights[timestep] * loss).mean()
        return Loss(total, total.detach())

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


def huber(difference: Tensor, c: float, scale: float | None = None) -> Tensor:
    """Pseudo-Huber loss per sample, (B,): about the square below c, linear above it.

    scale: of the whole; 2 c by default, which makes it the square near 0. LCM's own has 1.
    """
    factor = 2 * c if scale is None else scale
    return factor * ((difference.square() + c**2).sqrt() - c).flatten(1).mean(1)


def timestep_weights(settings: TrainingSettings, alphas_cumprod: Tensor) -> Tensor:
    """The weight of each timestep's loss: (T,) float32. Source of min_snr: arXiv 2303.09556."""
    if settings.weighting == "min_snr":
        snr = alphas_cumprod / (1 - alphas_cumprod)
        weights = snr.clamp(max=settings.min_snr_gamma) / snr
    elif settings.weighting == "velocity":
        weights = (1 / alphas_cumprod).clamp(max=VELOCITY_LIMIT)
    else:
        weights = torch.ones_like(alphas_cumprod)
    return (weights * _between_points(settings.timestep_weights, len(weights))).float()


def _between_points(points, count) -> Tensor:
    """Linear between [timestep, factor] points, constant outside them; 1 without any."""
    if not points:
        return torch.ones(count, dtype=torch.float64)
    points = sorted(points)
    factors = torch.full((count,), points[-1][1], dtype=torch.float64)
    times = torch.arange(count, dtype=torch.float64)
    for (left, low), (right, high) in zip(points[-2::-1], points[:0:-1], strict=True):
        share = (times - left) / max(right - left, 1e-9)
        factors = torch.where(times <= right, low + share * (high - low), factors)
    return torch.where(times <= points[0][0], points[0][1], factors)


def _null_caption(model: PixArt, encoded: Tensor | None) -> tuple[Tensor, bool] | None:
    """(states (L, D), whether they are the learned ones), or None where there are none."""
    if model.has_null_caption:
        return model.y_embedder.y_embedding, True
    return None if encoded is None else (encoded.to(next(model.parameters()).device), False)


def replace_captions(caption: Tensor, mask: Tensor, dropped: Tensor, null: Tensor, is_learned: bool):
    """Caption (B, L, D) and mask (B, L) with the null caption in the rows that are dropped.

    The learned one keeps the caption's own mask, as PixArt was trained; encoded states bring theirs.
    """
    length = caption.shape[1]
    cut = null[:length].to(caption.dtype)
    filled = torch.cat([cut, cut.new_zeros(length - len(cut), cut.shape[1])]) if len(cut) < length else cut
    caption = torch.where(dropped[:, None, None], filled, caption)
    if is_learned:
        return caption, mask
    own = torch.arange(length, device=mask.device) < len(cut)
    return caption, torch.where(dropped[:, None], own, mask)
