"""Dials that trade exactness for time: block caching across steps, guidance in a part of the steps, fewer keys."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch

from ....pixart.acceleration.guidance_reuse import FORECASTS, GuidanceReuse, KeptGuidance
from ..text.captions import pixart_config
from .block_cache import BLOCK_CACHE, FIRST_BLOCKS, MODES, BlockCache, patched_blocks, window_of
from .kv_compression import KV_COMPRESSION, KVCompression

__all__ = ["FORECASTS", "MODES", "cache_blocks", "compress_attention", "limit_guidance", "reuse_guidance"]

log = logging.getLogger(__name__)
IN_THE_WAY = (
    "PixArt Guidance Reuse does nothing: another node on this model (such as NAG or Self-Attention Guidance) reads the "
    "negative prompt at every step."
)

WRAPPERS = comfy.patcher_extension.WrappersMP
INTERVAL = "pixart_guidance_interval"
REUSE = "pixart_guidance_reuse"  # transformer option: the _GuidedRun of a run
ALL_NEEDED = "disable_cfg1_optimization"  # model option of nodes that read the negative prompt's forward pass


@dataclass(frozen=True)
class _CacheSettings:
    """What the node says; every run makes a BlockCache of its own from it."""

    threshold: float
    first_block: int
    last_block: int
    start_percent: float
    end_percent: float
    most_reuses: int
    mode: str

    def make(self, model_sampling) -> BlockCache:
        active = _between(model_sampling, self.start_percent, self.end_percent)
        return BlockCache(self.threshold, self.first_block, self.last_block, active, self.most_reuses, self.mode)


def _between(model_sampling, start_percent: float, end_percent: float):
    """A function that says of a sigma (tensor or None) whether it lies in this part of the sampling."""
    highest = float(model_sampling.percent_to_sigma(start_percent))
    lowest = float(model_sampling.percent_to_sigma(end_percent))
    return lambda sigma: sigma is not None and lowest <= float(sigma.flatten()[0]) <= highest


def _check_interval(start_percent: float, end_percent: float) -> None:
    if start_percent >= end_percent:
        raise ValueError(
            f"Empty interval: got start {start_percent:g} and end {end_percent:g}, expected the start first. "
            f"Set start_percent below end_percent."
        )


def cache_blocks(model, threshold, first_block, last_block, start_percent, end_percent, most_reuses, mode=FIRST_BLOCKS):
    """A clone of the MODEL that skips blocks [first_block, last_block) while the ones before change little.

    last_block: 0 for all. The percents are of the sampling. mode: of MODES.
    Raises ValueError for a wrong range or another model.
    """
    depth = pixart_config(model).depth
    last_block = last_block or depth
    if not 1 <= first_block < last_block <= depth:
        raise ValueError(
            f"Wrong blocks: got {first_block} to {last_block}, expected 1 <= first_block < last_block <= {depth}. "
            f"Set first_block to 1 and last_block to 0 for all of this model's blocks."
        )
    _check_interval(start_percent, end_percent)
    patched = model.clone()
    settings = _CacheSettings(threshold, first_block, last_block, start_percent, end_percent, most_reuses, mode)
    patched.model_options["transformer_options"][BLOCK_CACHE + "_settings"] = settings
    patched.remove_wrappers_with_key(WRAPPERS.OUTER_SAMPLE, BLOCK_CACHE)
    patched.add_wrapper_with_key(WRAPPERS.OUTER_SAMPLE, BLOCK_CACHE, _sample_with_cache)
    patched.remove_wrappers_with_key(WRAPPERS.CALC_COND_BATCH, BLOCK_CACHE)
    patched.add_wrapper_with_key(WRAPPERS.CALC_COND_BATCH, BLOCK_CACHE, _evaluate_with_cache)
    return patched


def _evaluate_with_cache(executor, model, conds, x, timestep, model_options):
    """All prompts at one noise level: where one is evaluated several times in it, that is of tiles."""
    cache = model_options.get("transformer_options", {}).get(BLOCK_CACHE)
    if cache is not None:
        cache.next_turn()
    return executor(model, conds, x, timestep, model_options)


def _sample_with_cache(executor, *args, **kwargs):
    """One run with a state of its own, which goes with it however it ends."""
    guider = executor.class_obj
    before = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(before)
    options = guider.model_options["transformer_options"]
    settings = options[BLOCK_CACHE + "_settings"]
    cache = settings.make(guider.model_patcher.get_model_object("model_sampling"))
    options[BLOCK_CACHE] = cache
    try:
        return executor(*args, **kwargs)
    finally:
        guider.model_options = before
        cache.clear()
        log.info("PixArt Block Cache: %d of %d evaluations were skipped.", cache.skipped, cache.evaluations)


def limit_guidance(model, start_percent, end_percent):
    """A clone of the MODEL that is guided between two percents of the sampling only; elsewhere the positive prompt
    alone is computed.

    Raises ValueError for an empty interval.
    Source: Applying Guidance in a Limited Interval, arXiv 2404.07724.
    """
    _check_interval(start_percent, end_percent)
    patched = model.clone()
    active = _between(patched.get_model_object("model_sampling"), start_percent, end_percent)

    def predict(executor, x, timestep, model_options, seed=None):
        guider = executor.class_obj
        positive, negative = guider.conds.get("positive"), guider.conds.get("negative")
        if positive is None or active(timestep):
            return executor(x, timestep, model_options, seed)
        # At a scale of 1 the host leaves the negative prompt out. Guiders of three prompts would not.
        return comfy.samplers.sampling_function(
            guider.inner_model, x, timestep, negative, positive, 1.0, model_options, seed
        )

    patched.remove_wrappers_with_key(WRAPPERS.PREDICT_NOISE, INTERVAL)
    patched.add_wrapper_with_key(WRAPPERS.PREDICT_NOISE, INTERVAL, predict)
    return patched


@dataclass(frozen=True)
class _ReuseSettings:
    """What the node says."""

    reuse: GuidanceReuse
    start_percent: float
    end_percent: float
    say: Callable[[str], None] | None

    def notice(self, text: str) -> None:
        """Say it in the log, and to whoever wants to know."""
        log.warning(text)
        if self.say is not None:
            self.say(text)


def reuse_guidance(model, every, forecast, start_percent, end_percent, say=None) -> tuple:
    """A clone of the MODEL that computes all prompts in one of `every` steps, and the positive one in each; between
    two percents of the sampling. And what stands in its way, or "".

    The others follow at the distance that they had, or along the line of the last two: forecast. say: called with what
    turns out to stand in its way, or to leave it nothing to do, while a picture is sampled.
    Raises ValueError for an empty interval.
    """
    _check_interval(start_percent, end_percent)
    patched = model.clone()
    patched.remove_wrappers_with_key(WRAPPERS.OUTER_SAMPLE, REUSE)
    patched.remove_wrappers_with_key(WRAPPERS.CALC_COND_BATCH, REUSE)
    reuse = GuidanceReuse(every, forecast)
    if every == 1:
        return patched, ""
    settings = _ReuseSettings(reuse, start_percent, end_percent, say)
    patched.model_options["transformer_options"][REUSE + "_settings"] = settings
    patched.add_wrapper_with_key(WRAPPERS.OUTER_SAMPLE, REUSE, _sample_with_reuse)
    patched.add_wrapper_with_key(WRAPPERS.CALC_COND_BATCH, REUSE, _predict_prompts)
    return patched, IN_THE_WAY if model.model_options.get(ALL_NEEDED) else ""


def _sample_with_reuse(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    """One run with differences of its own, which go with it however it ends."""
    guider = executor.class_obj
    before = guider.model_options
    settings = before["transformer_options"][REUSE + "_settings"]
    if before.get(ALL_NEEDED):
        settings.notice(IN_THE_WAY)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    guider.model_options = comfy.model_patcher.create_model_options_clone(before)
    options = guider.model_options["transformer_options"]
    sampling = guider.model_patcher.get_model_object("model_sampling")
    active = _between(sampling, settings.start_percent, settings.end_percent)
    kept = settings.reuse.begin(sigmas.tolist(), lambda level: active(torch.tensor(level)))
    options[REUSE] = _GuidedRun(guider, kept)
    try:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        guider.model_options = before
        kept.clear()
        log.info("PixArt Guidance Reuse: %d of %d guided evaluations.", kept.reused, kept.reused + kept.computed)
        if not kept.computed:
            settings.notice("PixArt Guidance Reuse had nothing to do: no prompt but the positive one was computed.")


def _predict_prompts(executor, model, conds, x, timestep, model_options):
    run = model_options.get("transformer_options", {}).get(REUSE)
    if run is None:
        return executor(model, conds, x, timestep, model_options)
    return run.predict(executor, model, conds, x, timestep, model_options)


class _GuidedRun:
    """One sampling run: knows the guider's positive prompt among those that the host evaluates."""

    def __init__(self, guider, kept: KeptGuidance):
        self.guider, self.kept = guider, kept
        self.last: tuple = (None, None, None)  # latent, its noise levels, and what the positive prompt gives for it

    def predict(self, executor, model, conds, x, timestep, model_options):
        """What each prompt denoises x to, as the host's own function gives it: a list of (B, C, H, W)."""
        place = self._positive_among(conds)
        others = [index for index, each in enumerate(conds) if each is not None and index != place]
        known = place is not None or (self.last[0] is x and torch.equal(self.last[1], timestep))
        if not others or not known:
            out = executor(model, conds, x, timestep, model_options)
            return self._note(out, place, x, timestep)
        level = float(timestep.flatten()[0])
        scale = timestep.reshape(-1, *[1] * (x.ndim - 1)) if timestep.numel() > 1 else level
        around = self._around(x, level, model_options)
        keys = {index: (*around, _prompts_at(conds[index], level)) for index in others}
        found = {index: self.kept.recall(key, level) for index, key in keys.items()}
        if any(difference is None for difference in found.values()):
            out = self._note(executor(model, conds, x, timestep, model_options), place, x, timestep)
            for index, key in keys.items():
                self.kept.keep(key, level, (out[index] - self.last[2]) / scale)
            self.kept.computed += 1
            return out
        out = [torch.zeros_like(x) for _ in conds]
        if place is not None:
            alone = [each if index == place else None for index, each in enumerate(conds)]
            out = self._note(executor(model, alone, x, timestep, model_options), place, x, timestep)
        for index, difference in found.items():
            out[index] = self.last[2] + difference * scale
        self.kept.reused += 1
        return out

    def _note(self, out, place, x, timestep):
        if place is not None:
            self.last = x, timestep, out[place]
        return out

    def _positive_among(self, conds):
        """Which of the prompts is the guider's positive one; None where none is."""
        positive = {entry.get("uuid") for entry in self.guider.conds.get("positive") or ()}
        return next((i for i, each in enumerate(conds) if each and {e.get("uuid") for e in each} <= positive), None)

    def _around(self, x, level, model_options):
        """What a difference depends on beside the prompt: patched blocks, the host's window, what is positive now."""
        options = model_options.get("transformer_options", {})
        positive = _prompts_at(self.guider.conds.get("positive"), level)
        return tuple(x.shape), patched_blocks(options), window_of(options), positive


def _prompts_at(conds, level):
    """The entries of a prompt that count at a noise level, as the host decides it."""
    highest, lowest = float("inf"), float("-inf")
    return tuple(
        entry.get("uuid")
        for entry in conds or ()
        if float(entry.get("timestep_end", lowest)) <= level <= float(entry.get("timestep_start", highest))
    )


def compress_attention(model, factor, blocks, start_percent, end_percent):
    """A clone of the MODEL whose self-attention reads averages of factor x factor tokens, between two percents of the
    sampling; exactly the MODEL at factor 1. blocks: of kv_compression.BLOCKS.

    Raises ValueError for an empty interval or another model.
    Source: PixArt-Sigma's key-value compression, arXiv 2403.04692, section 3.3, as it starts its training.
    """
    pixart_config(model)
    _check_interval(start_percent, end_percent)
    patched = model.clone()
    patched.remove_wrappers_with_key(WRAPPERS.DIFFUSION_MODEL, KV_COMPRESSION)
    if factor == 1:
        return patched
    compression = KVCompression(factor, blocks)
    always = start_percent <= 0 and end_percent >= 1  # nothing to look up then, which suits compiled models
    active = _between(patched.get_model_object("model_sampling"), start_percent, end_percent)

    def forward(executor, x, timesteps, context, control=None, transformer_options=None, **conds):
        options = {} if transformer_options is None else transformer_options
        if always or active(options.get("sigmas")):
            options = {**options, KV_COMPRESSION: compression}
        return executor(x, timesteps, context, control, options, **conds)

    patched.add_wrapper_with_key(WRAPPERS.DIFFUSION_MODEL, KV_COMPRESSION, forward)
    return patched
