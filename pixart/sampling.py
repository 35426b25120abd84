"""Sampling without ComfyUI: a PixArt and captions to latents, by the pack's solvers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .config import LATENT_DOWNSCALE
from .layers import blank_hidden, lengthen
from .quoting import shorten
from .solvers import SAMPLERS, Asked, SampleNoise, noise_seeds, schedule_sigmas, timesteps_where_sigmas_are, traits_of
from .text import batch_captions
from .transformer import PixArt, ProjectedCaption

FIRST_SIGMA_SLACK = 1e-5
KEPT_KEYS_BYTES = 256 * 2**20  # of captions' keys and values in all blocks, kept while a picture is sampled
SEEDS = 2**64  # as many as PyTorch takes


@dataclass(frozen=True)
class Captions:
    """T5 states (B, L, D) with their mask (B, L), True = keep."""

    states: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, states: Sequence[torch.Tensor]) -> "Captions":
        """Captions of states (L, D) of any lengths."""
        return cls(*batch_captions([each[None] for each in states]))


@dataclass(frozen=True)
class Settings:
    """solver: key of SAMPLERS, with its options. schedule: key of SCHEDULES. guidance: 0 to 1 is off, as in diffusers.

    is_clean: end at sigma 0, as diffusers' schedulers do; None as the original does. scheduler: what a diffusers folder
    asks for, whose noise levels are then taken in place of the schedule's.
    """

    solver: str = "dpm_solver"
    schedule: str = "uniform"
    steps: int = 20
    guidance: float = 4.5
    options: dict = field(default_factory=dict)
    is_clean: bool | None = field(default=None, repr=False)
    scheduler: Asked | None = field(default=None, repr=False)

    @property
    def levels(self) -> torch.Tensor:
        """The noise levels of a run, (steps + 1,) float64. Raises ValueError as the schedule does."""
        if self.scheduler is not None:
            return self.scheduler.levels(self.steps)
        return schedule_sigmas(self.schedule, self.steps, end_clean=self.is_clean)


def whole(mask: torch.Tensor) -> bool:
    """Whether a mask hides nothing. Asked once a run, since to look is to wait for the device."""
    return mask.device.type != "meta" and bool(mask.all())


class Partners(Protocol):
    """Two that compute one picture: the first (place 0) what a prompt predicts, the second (1) what its negative does.

    gather: this one's tensor -> both ones', in the order of their places, the same bits for both.
    """

    place: int

    def gather(self, part: torch.Tensor) -> list[torch.Tensor]: ...


class GuidedModel:
    """PixArt as a solver calls it: (x, sigma) -> the denoised latent, guided by a positive and a negative caption."""

    def __init__(
        self,
        model: PixArt,
        positive: Captions,
        negative: Captions,
        guidance: float,
        guided_channels=None,
        keep=False,
        reuse=None,
        partners: Partners | None = None,
    ):
        """guided_channels: how many channels the guidance moves; None for all.

        keep: project the captions once, for a PixArt whose weights stay as they are. reuse: a KeptGuidance of
        `acceleration`, or None to compute both captions at every step.
        partners: with guidance, who else computes this picture; then without reuse.
        """
        self.model, self.guidance, self.guided_channels, self.reuse = model, guidance, guided_channels, reuse
        self.is_guided = not 0 <= guidance <= 1
        captions = [positive, negative] if self.is_guided else [positive]
        self.partners = partners if self.is_guided else None
        if self.partners is not None:
            captions = captions[self.partners.place :][:1]
        rows = [state for each in captions for state in each.states]
        masks = [mask for each in captions for mask in each.mask]
        longest = max(len(row) for row in rows)
        self.states = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
        mask = torch.stack([torch.nn.functional.pad(mask, (0, longest - len(mask))) for mask in masks])
        self.states, self.mask = blank_hidden(self.states, mask), None  # without one attention takes its fastest way
        if not whole(mask):
            self.states, self.mask = lengthen(self.states, mask)
        self.variance_channels = None
        self.caption = self.states
        if keep:
            config = model.config
            numbers = self.states[..., 0].numel() * 2 * config.hidden_size * config.depth
            with torch.no_grad():
                kept = numbers * self.states.element_size() <= KEPT_KEYS_BYTES
                self.caption = model.project_caption(self.states, keep_keys=kept)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_) -> torch.Tensor:
        level, channels = sigma[0], x.shape[1]
        difference = self.reuse.recall("negative", float(level)) if self.is_guided and self.reuse else None
        if self.partners is None:
            positive, *negative = self._predict(x, level, 2 if self.is_guided and difference is None else 1)
        else:
            positive, *negative = self.partners.gather(self._predict(x, level, 1)[0])
        self.variance_channels = positive[:, channels:] if positive.shape[1] > channels else None
        denoised = x - level * positive[:, :channels]
        if not self.is_guided:
            return denoised
        if difference is None:
            unguided = x - level * negative[0][:, :channels]
            if self.reuse:
                self.reuse.keep("negative", float(level), (unguided - denoised) / level)
        else:
            unguided = denoised + difference * level
        guided = unguided + (denoised - unguided) * self.guidance
        if self.guided_channels is not None:
            guided[:, self.guided_channels :] = denoised[:, self.guided_channels :]
        return guided

    def _predict(self, x, level, halves):
        """What the model says of `halves` of the captions, each (B, C_out, H, W) float32."""
        latent = (x / (level**2 + 1).sqrt()).repeat(halves, 1, 1, 1).to(self.states.dtype)
        time = timesteps_where_sigmas_are(level).clamp(min=0).float()
        captions, mask = self.caption, self.mask
        if len(latent) < len(self.states):
            captions = (
                captions.first(len(latent)) if isinstance(captions, ProjectedCaption) else captions[: len(latent)]
            )
            mask = None if mask is None else mask[: len(latent)]
        return self.model(latent, time[None], captions, mask).float().chunk(halves)  # of the latent's own size

    def variance(self) -> torch.Tensor | None:
        """The variance channels of the last evaluation's conditional half."""
        return self.variance_channels


def sample_latents(
    model: PixArt,
    positive: Captions,
    negative: Captions,
    height_px: int,
    width_px: int,
    seeds: Sequence[int],
    settings: Settings,
    on_step: Callable[[dict], None] | None = None,
    keep: bool = False,
    reuse=None,
    partners: Partners | None = None,
) -> torch.Tensor:
    """Latents (B, C, h, w), unscaled, from noise: what a KSampler with the same seed and settings gives.

    positive, negative: of one batch size. seeds: one for each picture, which decides its noise whatever the batch; 0
    comes after 2**64 - 1. on_step: a solver's callback. keep: see GuidedModel.
    reuse: a GuidanceReuse of `acceleration`, or None. partners: see GuidedModel.
    Raises ValueError for unknown settings.
    """
    if settings.solver not in SAMPLERS:
        raise ValueError(
            f"Unknown solver: got {shorten(settings.solver)}, expected one of {', '.join(SAMPLERS)}. Choose one."
        )
    device = positive.states.device
    levels = settings.levels.float()
    shape = (1, model.config.in_channels, height_px // LATENT_DOWNSCALE, width_px // LATENT_DOWNSCALE)
    generators = [torch.Generator().manual_seed(seed % SEEDS) for seed in seeds]
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    full = float(levels[0]) > float(schedule_sigmas("uniform", 1)[0]) * (1 - FIRST_SIGMA_SLACK)
    x = (noise * ((1 + levels[0] ** 2).sqrt() if full else levels[0])).to(device)
    traits = traits_of(SAMPLERS[settings.solver])
    kept = None if reuse is None else reuse.begin(levels.tolist())
    guided = GuidedModel(model, positive, negative, settings.guidance, traits.guided_channels, keep, kept, partners)
    options = dict(settings.options)
    if traits.draws_noise:
        options["noise_sampler"] = SampleNoise(x, noise_seeds(noise))
    if traits.reads_variance:
        options["variance"] = guided.variance
    with torch.no_grad():
        x = SAMPLERS[settings.solver](guided, x, levels.to(device), callback=on_step, disable=True, **options)
    return x / model.config.vae_scale
