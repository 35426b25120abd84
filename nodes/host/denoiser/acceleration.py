"""Dials that trade exactness for time: block caching across steps, guidance in a part of the steps, fewer keys."""

import logging
from dataclasses import dataclass

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers

from ..text.captions import pixart_config
from .block_cache import BLOCK_CACHE, BlockCache
from .kv_compression import KV_COMPRESSION, KVCompression

log = logging.getLogger(__name__)

WRAPPERS = comfy.patcher_extension.WrappersMP
INTERVAL = "pixart_guidance_interval"


@dataclass(frozen=True)
class _CacheSettings:
    """What the node says; every run makes a BlockCache of its own from it."""

    threshold: float
    first_block: int
    last_block: int
    start_percent: float
    end_percent: float
    most_reuses: int

    def make(self, model_sampling) -> BlockCache:
        active = _between(model_sampling, self.start_percent, self.end_percent)
        return BlockCache(self.threshold, self.first_block, self.last_block, active, self.most_reuses)


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


def cache_blocks(model, threshold, first_block, last_block, start_percent, end_percent, most_reuses):
    """A clone of the MODEL that skips blocks [first_block, last_block) while the ones before change little.

    last_block: 0 for all. The percents are of the sampling. Raises ValueError for a wrong range or another model.
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
    settings = _CacheSettings(threshold, first_block, last_block, start_percent, end_percent, most_reuses)
    patched.model_options["transformer_options"][BLOCK_CACHE + "_settings"] = settings
    patched.remove_wrappers_with_key(WRAPPERS.OUTER_SAMPLE, BLOCK_CACHE)
    patched.add_wrapper_with_key(WRAPPERS.OUTER_SAMPLE, BLOCK_CACHE, _sample_with_cache)
    return patched


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
