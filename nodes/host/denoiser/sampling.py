"""The solvers and schedules as ComfyUI's SAMPLER, SIGMAS and entries of KSampler's lists."""

import logging

import comfy.k_diffusion.sampling
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import torch

from ....pixart.quoting import shorten
from ....samplers import SAMPLERS
from ....samplers.contract import GUIDED_CHANNELS, traits_of
from ....samplers.from_diffusers import AS_THE_FOLDER_SAYS, read_scheduler
from ....samplers.noise import SampleNoise, batch_seeds, noise_seeds
from ....samplers.presets import PRESETS
from ....samplers.schedules import SCHEDULES, schedule_sigmas, sigmas
from .model import VARIANCE_SINK

PREFIX = "pixart_"
GUIDANCE_MODES = ("original", "all channels")
CONDITIONAL = 0  # in the host's cond_or_uncond
SIGMA_SLACK = 1e-3


def make_sampler(name, **options):
    """A SAMPLER of the solver `name` (key of SAMPLERS) with its options, and noise_device where it draws noise."""
    return comfy.samplers.KSAMPLER(_sampler_function(name), options)


def make_sigmas(name, steps, denoise=1.0, end_clean=None, model=None):
    """SIGMAS, (steps + 1,) float32, of the schedule `name` (key of SCHEDULES). model: a MODEL to check, or None."""
    if model is not None:
        _check_schedule(model.get_model_object("model_sampling"))
    return schedule_sigmas(name, steps, denoise, end_clean).float()


def apply_preset(name, model, denoise=1.0):
    """SAMPLER, SIGMAS, guidance and a notice (empty when the preset suits the model) of a published setting, or of
    AS_THE_FOLDER_SAYS: what the scheduler of the model's diffusers folder asks for.
    """
    if name == AS_THE_FOLDER_SAYS:
        return _apply_scheduler(model, denoise)
    preset = PRESETS[name]
    sampler = make_sampler(preset.sampler, **preset.options)
    levels = make_sigmas(preset.schedule, preset.steps, denoise, model=model)
    notice = "\n".join(_misfits(preset, getattr(model.model, "pixart_config", None)))
    if notice:
        logging.warning("PixArt preset %s: %s", name, notice)
    return sampler, levels, preset.guidance, notice


def _apply_scheduler(model, denoise):
    config = getattr(model.model, "pixart_source", {}).get("scheduler")
    if config is None:
        raise ValueError(
            f"No scheduler: got a model without one, expected one of a diffusers folder with scheduler/ in it. Load it "
            f"with Load PixArt Diffusers, or choose another preset than '{AS_THE_FOLDER_SAYS}'."
        )
    _check_schedule(model.get_model_object("model_sampling"))
    asked = read_scheduler(config)
    sampler = make_sampler(asked.sampler, **asked.options(asked.steps, denoise))
    notice = "\n".join((str(asked), *asked.remarks))
    return sampler, asked.levels(asked.steps, denoise).float(), asked.guidance, notice


def register_samplers():
    """Put the solvers and schedules into KSampler's own lists. Doing it again changes nothing."""
    for name in SAMPLERS:
        public = PREFIX + name
        setattr(comfy.k_diffusion.sampling, f"sample_{public}", _sampler_function(name))
        for names in (comfy.samplers.KSAMPLER_NAMES, comfy.samplers.KSampler.SAMPLERS):
            if public not in names:
                names.append(public)
    for name in SCHEDULES:
        public = PREFIX + name
        comfy.samplers.SCHEDULER_HANDLERS[public] = comfy.samplers.SchedulerHandler(_schedule_function(name))
        if public not in comfy.samplers.SCHEDULER_NAMES:
            comfy.samplers.SCHEDULER_NAMES.append(public)


def _schedule_function(name):
    def schedule(model_sampling, steps):
        _check_schedule(model_sampling)
        return schedule_sigmas(name, steps).float()

    return schedule


def _sampler_function(name):
    """The solver as the host calls it: with the host's noise, masks, and the model's variance channels."""
    solve = SAMPLERS[name]
    traits = traits_of(solve)

    def sample(model, x, levels, extra_args=None, callback=None, disable=None, **options):
        _check_prediction(model)
        extra_args = extra_args or {}
        if traits.draws_noise:
            options.setdefault("noise_sampler", _step_noise(model, x, extra_args, options.get("noise_device", "cpu")))
        if traits.reads_variance:
            extra_args, options = _with_variance(x, extra_args, options)
        if traits.scales_noise:
            latent = getattr(model, "latent_image", None)
            options["pure_noise"] = latent is None or not torch.count_nonzero(latent)
        result = solve(model, x, levels, extra_args, callback, disable, **options)
        return _restore_unmasked(model, result, levels, extra_args)

    sample.__name__ = f"sample_{PREFIX}{name}"
    return sample


def _step_noise(model, x, extra_args, device):
    """Noise whose seed for each sample is that sample's initial noise, so that it follows the sample into any batch.

    Without initial noise ("add noise" off) sample i has the seed of the run plus i.
    """
    initial = getattr(model, "noise", None)
    if initial is None or not torch.count_nonzero(initial):
        return SampleNoise(x, batch_seeds(extra_args.get("seed"), x.shape[0]), device)
    return SampleNoise(x, noise_seeds(initial), device)


class _VarianceSink:
    """Collects what the model's calls of one evaluation predicted. No list: the host would copy that."""

    def __init__(self, x):
        self.channels, self.shape, self.device = x.shape[1], x.shape, x.device
        self.predictions = []

    def append(self, item):
        """item: (cond_or_uncond, prediction), as the model reports it."""
        self.predictions.append(item)

    def take(self):
        """The conditional variance channels, (B, C, H, W) float32, mean over prompts of full size; None if none."""
        found, self.predictions = self._conditional(), []
        return torch.stack(found).mean(0) if found else None

    def _conditional(self):
        found = []
        for order, prediction in self.predictions:
            for index, chunk in zip(order, prediction.chunk(len(order)), strict=True):
                variance = chunk[:, self.channels :]
                if index == CONDITIONAL and variance.shape == self.shape:
                    found.append(variance.to(self.device, torch.float32))
        return found


def _with_variance(x, extra_args, options):
    """IDDPM's extra arguments and options: the sink of the variance channels, and the original's guidance."""
    options = dict(options)
    mode = options.pop("guidance", GUIDANCE_MODES[0])
    if mode not in GUIDANCE_MODES:
        raise ValueError(
            f"Unknown guidance: got {shorten(mode)}, expected {' or '.join(GUIDANCE_MODES)}. Choose original."
        )
    sink = _VarianceSink(x)
    model_options = dict(extra_args.get("model_options", {}))
    model_options["transformer_options"] = {**model_options.get("transformer_options", {}), VARIANCE_SINK: sink}
    if mode == GUIDANCE_MODES[0]:
        later = model_options.get("sampler_post_cfg_function", [])
        model_options["sampler_post_cfg_function"] = [_guide_three_channels, *later]
    return {**extra_args, "model_options": model_options}, {**options, "variance": sink.take}


def _guide_three_channels(args):
    """The original's guidance: the fourth channel stays the conditional one."""
    guided = args["denoised"].clone()
    guided[:, GUIDED_CHANNELS:] = args["cond_denoised"][:, GUIDED_CHANNELS:]
    return guided


def _restore_unmasked(model, x, levels, extra_args):
    """Outside the mask, the picture as it was: a run that ends at t = 0 leaves 1 % of noise there.

    Unlike the solvers, the host's own ones end at sigma 0, where the masked model already gives this.
    """
    mask = extra_args.get("denoise_mask")
    if mask is None or float(levels[-1]) > sigmas(0.0).item() + SIGMA_SLACK:
        return x
    change = extra_args.get("model_options", {}).get("denoise_mask_function")
    if change is not None:
        last = levels[-2].expand(x.shape[0])
        mask = change(last, mask, extra_options={"model": model.inner_model, "sigmas": levels})
    return x * mask + model.latent_image * (1.0 - mask)


def _check_prediction(model):
    """Raises ValueError for a flow-matching model, whose noising the solvers do not describe."""
    sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.CONST):
        kind = type(model.inner_model.inner_model).__name__
        raise ValueError(
            f"PixArt's solvers do not fit a flow-matching model: got {kind}, expected a diffusion model. "
            "Connect a PixArt model, or choose one of ComfyUI's own samplers."
        )


def _check_schedule(model_sampling):
    """Raises ValueError unless the model's highest noise level is that of PixArt's schedules."""
    expected, given = sigmas(999.0).item(), float(model_sampling.sigma_max)
    if abs(given / expected - 1.0) > SIGMA_SLACK:
        raise ValueError(
            f"PixArt's schedules do not fit this model: got a highest sigma of {given:g}, expected {expected:g}. "
            "Connect a PixArt model, or choose one of ComfyUI's own schedulers."
        )


def _misfits(preset, config):
    """What speaks against using a preset with a model: one sentence each. config: PixArtConfig, None for others."""
    if config is None:
        return ["The preset is for PixArt models, and this is another one."]
    reasons = []
    if preset.is_sigma != config.is_sigma:
        family = "PixArt-Sigma" if preset.is_sigma else "PixArt-alpha"
        reasons.append(f"The preset is for {family} models; choose the one of this model's family.")
    if preset.distilled:
        reasons.extend(_distillation_misfits(preset, config))
    elif preset.sampler == "iddpm" and not config.learn_sigma:
        reasons.append("The model has no variance channels; IDDPM will use the posterior variance.")
    return reasons


def _distillation_misfits(preset, config):
    if config.base_px != preset.base_px:
        return [f"{preset.distilled} weights exist for {preset.base_px} px; this model is for {config.base_px} px."]
    return []
