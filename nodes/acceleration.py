"""Acceleration nodes: less time for a picture that is nearly the same."""

import functools

from comfy_api.latest import io, ui

from .host.denoiser.acceleration import FORECASTS, cache_blocks, compress_attention, limit_guidance, reuse_guidance
from .host.denoiser.acceleration import MODES as CACHE_MODES
from .host.denoiser.compilation import MODES, SIZES, compile_model
from .host.denoiser.kv_compression import BLOCKS, EVERY_OTHER
from .host.schema import choice_input, node_input, percent_input, schema
from .host.text.captions import show_text

CATEGORY = "PixArt/acceleration"


def _percent(name: str, default: float, tooltip: str, advanced=False):
    return percent_input(name, default, tooltip, optional=True, advanced=advanced)


class BlockCache(io.ComfyNode):
    """Reuse what most blocks did at the step before."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtBlockCache",
            display_name="PixArt Block Cache",
            category=CATEGORY,
            description="Skips most blocks at steps where the first ones say that little has changed, and adds what "
            "they would add if it went on as between the two whole steps before. The picture changes a little; "
            "threshold says how much may change. Works with ControlNet, LoRA and every sampler.",
            search_aliases=["pixart cache", "first block cache", "fbcache", "teacache", "easycache", "speed"],
            inputs=[
                node_input(io.Model, "model", tooltip="The PixArt model."),
                node_input(
                    io.Float,
                    "threshold",
                    default=0.3,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Largest relative change of what the first blocks add at which the rest is reused. 0 "
                    "never reuses; more is faster and less exact.",
                ),
                _percent("start_percent", 0.1, "No reuse in this first part of the sampling, where the picture forms."),
                _percent("end_percent", 1.0, "No reuse after this part of the sampling.", advanced=True),
                node_input(
                    io.Int,
                    "most_reuses",
                    default=3,
                    min=1,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="How many evaluations in a row may reuse the same blocks.",
                ),
                node_input(
                    io.Int,
                    "first_block",
                    default=1,
                    min=1,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="The first block that may be skipped; those before always run and tell the change. With "
                    "input, forecast all may be skipped.",
                ),
                node_input(
                    io.Int,
                    "last_block",
                    default=0,
                    min=0,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="The block at which the model runs on after a reuse; 0 skips up to the end.",
                ),
                choice_input(
                    "mode",
                    CACHE_MODES,
                    tooltip="What tells the change, and how the rest goes on. first blocks: they run, and the rest "
                    "follows them. first blocks, forecast: the rest follows the noise level. input, forecast: what "
                    "the first block reads tells the change, summed up over the steps, and no block runs; saves most.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the cache.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        threshold,
        start_percent=0.1,
        end_percent=1.0,
        most_reuses=3,
        first_block=1,
        last_block=0,
        mode=CACHE_MODES[0],
    ):
        return io.NodeOutput(
            cache_blocks(model, threshold, first_block, last_block, start_percent, end_percent, most_reuses, mode)
        )


class GuidanceInterval(io.ComfyNode):
    """Guide only in a part of the sampling."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtGuidanceInterval",
            display_name="PixArt Guidance Interval",
            category=CATEGORY,
            description="Guides only in a part of the sampling. Elsewhere the negative prompt is not computed, which "
            "halves those steps.",
            search_aliases=["cfg interval", "limited interval guidance", "guidance limiter", "cfg end", "speed"],
            inputs=[
                node_input(io.Model, "model", tooltip="Any diffusion model."),
                _percent("start_percent", 0.3, "Where guidance begins, as a part of the sampling."),
                _percent("end_percent", 1.0, "Where guidance ends, as a part of the sampling."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the limited guidance.")],
        )

    @classmethod
    def execute(cls, model, start_percent=0.3, end_percent=1.0):
        return io.NodeOutput(limit_guidance(model, start_percent, end_percent))


class GuidanceReuse(io.ComfyNode):
    """Compute the negative prompt in one of several steps."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtGuidanceReuse",
            display_name="PixArt Guidance Reuse",
            category=CATEGORY,
            description="Computes the negative prompt in one of several steps only; between them its difference from "
            "the positive one stays as it was. Faster, and the picture is nearly the same. Works under every guider "
            "and sampler.",
            search_aliases=["cfg cache", "fastercfg", "skip cfg", "guidance cache", "cfg reuse", "speed"],
            inputs=[
                node_input(io.Model, "model", tooltip="Any diffusion model."),
                node_input(
                    io.Int,
                    "every",
                    default=2,
                    min=1,
                    max=10,
                    tooltip="In one of how many steps the negative prompt is computed. 1 changes nothing; 2 saves a "
                    "quarter, more is faster and less exact.",
                ),
                choice_input(
                    "forecast",
                    FORECASTS,
                    advanced=True,
                    tooltip="The difference in between: as it was, or along the line of the last two. As it was is "
                    "mostly closer to the exact picture.",
                ),
                _percent(
                    "start_percent",
                    0.1,
                    "Before this part of the sampling, where the picture forms, every step is computed.",
                ),
                _percent("end_percent", 1.0, "After this part of the sampling every step is computed.", advanced=True),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with reused guidance.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model, every, forecast=FORECASTS[0], start_percent=0.1, end_percent=1.0):
        say = functools.partial(show_text, cls.hidden)
        patched, trouble = reuse_guidance(model, every, forecast, start_percent, end_percent, say)
        show_text(cls.hidden, trouble)
        return io.NodeOutput(patched, ui=ui.PreviewText(trouble) if trouble else None)


class KVCompression(io.ComfyNode):
    """Let self-attention read averages of neighbouring tokens."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtKVCompression",
            display_name="PixArt KV Compression",
            category=CATEGORY,
            description="Saves time in large pictures, from 1024 px on: self-attention compares every token with "
            "averages of neighbouring tokens. Works with ControlNet, LoRA and every sampler.",
            search_aliases=["token merge", "tomesd", "todo", "kv compress", "token downsampling", "2k", "4k", "speed"],
            inputs=[
                node_input(io.Model, "model", tooltip="The PixArt model."),
                node_input(
                    io.Int,
                    "factor",
                    default=2,
                    min=1,
                    max=8,
                    tooltip="Side of the windows of tokens that are averaged: 2 leaves a quarter of the keys and "
                    "values. 1 changes nothing; more is faster and less exact.",
                ),
                node_input(
                    io.Combo,
                    "blocks",
                    options=list(BLOCKS),
                    default=EVERY_OTHER,
                    optional=True,
                    tooltip="Which blocks. Every other one stays close to the exact picture; all save twice as much.",
                ),
                _percent("start_percent", 0.0, "No compression before this part of the sampling.", advanced=True),
                _percent("end_percent", 1.0, "No compression after this part of the sampling.", advanced=True),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with compressed keys and values.")],
        )

    @classmethod
    def execute(cls, model, factor, blocks=EVERY_OTHER, start_percent=0.0, end_percent=1.0):
        return io.NodeOutput(compress_attention(model, factor, blocks, start_percent, end_percent))


class Compile(io.ComfyNode):
    """Compile one block, and use it for all."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtCompile",
            display_name="PixArt Compile",
            category=CATEGORY,
            description="Compiles one block of the model with PyTorch's compiler and uses it for all: a wait at the "
            "first step, then less time for each. Works with ControlNet, LoRA, the other acceleration nodes and "
            "every sampler. Where nothing can be compiled the node says why, and the model runs as it is.",
            search_aliases=["torch compile", "torchcompile", "inductor", "triton", "cuda graphs", "speed"],
            inputs=[
                node_input(io.Model, "model", tooltip="The PixArt model."),
                choice_input(
                    "mode",
                    MODES,
                    tooltip="tuned tries several kernels and takes the best, which makes the first wait longer. CUDA "
                    "graphs start all kernels of a block at once, for small pictures on a fast GPU.",
                ),
                choice_input(
                    "sizes",
                    SIZES,
                    advanced=True,
                    tooltip="learn what changes compiles for the first size, and at the second for all. any size at "
                    "once spares the second wait. each size for itself is fastest and waits at every new one.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with compiled blocks.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model, mode=MODES[0], sizes=SIZES[0]):
        compiled, trouble = compile_model(model, mode, sizes, functools.partial(show_text, cls.hidden))
        show_text(cls.hidden, trouble)
        return io.NodeOutput(compiled, ui=ui.PreviewText(trouble) if trouble else None)


NODES: list[type[io.ComfyNode]] = [BlockCache, GuidanceInterval, GuidanceReuse, KVCompression, Compile]
