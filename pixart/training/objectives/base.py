"""What all objectives share: the model's inputs out of a batch, the null caption, and how losses are weighed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...data.examples import Batch
from ...diffusion import Diffusion, mean_over
from ...transformer import PixArt
from ..draws import Draws
from ..settings import NEEDS_NULL, TrainingSettings

VELOCITY_LIMIT = 200.0  # largest weight of a timestep when all velocities weigh the same
Conditions = dict[str, Tensor | None]  # keyword arguments of the model


class Loss(NamedTuple):
    """total: to minimise. error: what shows whether the training is sane. bound: of the learned variance, or None.

    each: (B,) the errors of the batch's pictures, where they are known apart; what is trained does not depend on it.
    """

    total: Tensor
    error: Tensor
    bound: Tensor | None = None
    each: Tensor | None = None


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
        if self.null_caption is None and (settings.caption_dropout or settings.kind in NEEDS_NULL):
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

    def region(self, batch: Batch) -> Tensor | None:
        """Factors of the loss by place, (B, 1, h, w): 1 within the masks and mask_floor outside; None without masks."""
        floor = self.settings.mask_floor
        return None if batch.mask is None else floor + (1 - floor) * batch.mask.float()

    def importance(self, batch: Batch, factor: Tensor | None = None) -> Tensor | None:
        """Factors of the loss by picture, (B,), times another; None where there are none."""
        if batch.weight is None:
            return factor
        return batch.weight if factor is None else factor * batch.weight

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


def huber(difference: Tensor, c: float, scale: float | None = None, region: Tensor | None = None) -> Tensor:
    """Pseudo-Huber loss per sample, (B,): about the square below c, linear above it.

    scale: of the whole; 2 c by default, which makes it the square near 0. LCM's own has 1. region: see mean_over.
    """
    factor = 2 * c if scale is None else scale
    return factor * mean_over((difference.square() + c**2).sqrt() - c, region)


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
