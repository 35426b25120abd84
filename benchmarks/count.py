"""A guided step's work on a GPU, counted without one: kernels, memory touched, casts, copies, and activations.

Counted on tensors that have a device, a type and a shape alone: what predicts the noise for a prompt and its negative.
Of this pack in ComfyUI and alone, of ComfyUI's own PixArt, and of diffusers', each as its program feeds it in any step
but the first. An attention counts as one kernel. Other lengths of captions change next to nothing.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ..pixart.checkpoint import expected_shapes
from ..pixart.config import CONFIGS, LATENT_DOWNSCALE
from ..pixart.transformer import PixArt
from .counting import DEVICE, Counter, Counts, fake
from .host import import_host
from .peers import DIFFUSERS, HOST, OURS, host_settings, make_transformer
from .report import RESULTS, markdown_table

ALONE = "this pack, alone"
LENGTHS = 120, 20  # of the prompt and of its negative
SIDES_PX = 256, 512, 1024, 2048
WIDE = torch.bfloat16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
MIB, GB = 2**20, 1e9

logger = logging.getLogger(__name__)


def fake_weights(config, dtype):
    """Weights in the original layout on the GPU that is not there. Tables are never kept in 8 bits."""
    wide = torch.float16 if dtype.itemsize == 1 else dtype
    return {
        name: fake(shape, wide if name.endswith(("table", "y_embedding")) else dtype)
        for name, shape in expected_shapes(config).items()
    }


def _host_model(kind, config, dtype):
    """A model of the host, of this kind of description."""
    from ..nodes.host.weights.precision import set_inference_dtype

    description = kind(config)
    set_inference_dtype(description, dtype, WIDE if dtype.itemsize == 1 else None, torch.device("cpu"))
    return description


def _fake_buffers(model):
    """Puts what is computed while a model is built on the GPU that is not there."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fake(buffer.shape, buffer.dtype)


@contextlib.contextmanager
def pytorch_attention():
    """The host's attention as on a GPU, whatever it has chosen for this machine."""
    with unset_fake_temporarily():
        import_host("cpu")
        from comfy.ldm.modules import attention
        from comfy.ldm.pixart import blocks
    with (
        mock.patch.object(attention, "optimized_attention", attention.attention_pytorch),
        mock.patch.object(blocks, "optimized_attention", attention.attention_pytorch),
    ):
        yield


def _own_kind(config):
    """ComfyUI's description of its own PixArt."""
    import comfy.supported_models

    settings = host_settings(config)
    kind = comfy.supported_models.PixArtSigma if config.is_sigma else comfy.supported_models.PixArtAlpha
    description = kind(settings)
    description.unet_config = settings
    return description


def ours(config, dtype, batch=1, copies=0):
    """This pack in ComfyUI, which joins both captions into one batch under a mask.

    copies: of blocks of a ControlNet. The function's `model` is the host's.
    """
    with unset_fake_temporarily():  # what is computed while modules are imported and models built are numbers
        import_host("cpu")
        import comfy.model_patcher

        from ..nodes.host.controlnet import ControlNetModel
        from ..nodes.host.denoiser.model import PixArtModelConfig, name_tables

        model = _host_model(PixArtModelConfig, config, dtype).get_model({})
    _fake_buffers(model)
    model.diffusion_model.load_state_dict(name_tables(fake_weights(config, dtype)), assign=True)
    model.requires_grad_(False)
    model.current_patcher = comfy.model_patcher.ModelPatcher(model, torch.device(DEVICE), torch.device("cpu"))
    rows, wide = 2 * batch, model.get_dtype_inference()
    caption, mask = fake((rows, LENGTHS[0], config.caption_channels), wide), fake((rows, LENGTHS[0]), torch.long)
    branch = ControlNetModel(config, copies, wide).requires_grad_(False) if copies else None
    if branch is not None:
        weights = {name: fake(tensor.shape, wide) for name, tensor in branch.state_dict().items()}
        branch.load_state_dict(weights, assign=True)

    def step(side):
        size, ratio = (fake((1, n), torch.long).expand(rows, -1) for n in (2, 1))
        given = {"c_crossattn": caption, "attention_mask": mask, "c_size": size, "c_ar": ratio}
        if branch is not None:
            hint = fake((1, config.in_channels, side, side))
            given["control"] = branch(hint, hint, None, None, base_model=model.diffusion_model)
        return model.apply_model(fake((rows, config.in_channels, side, side)), fake((1,)).expand(rows), **given)

    step.model = model
    return step


def alone(config, dtype, batch=1):
    """This pack without ComfyUI."""
    net = PixArt(config, dtype=dtype, device="meta").eval().requires_grad_(False)
    net.load_state_dict(fake_weights(config, dtype), assign=True)
    net.requires_grad_(False)
    rows = 2 * batch
    caption = net.project_caption(fake((rows, LENGTHS[0], config.caption_channels), dtype))
    mask = fake((rows, LENGTHS[0]), torch.bool)
    return lambda side: net(fake((rows, config.in_channels, side, side), dtype), fake((1,)), caption, mask)


def comfyui(config, dtype, batch=1):
    """ComfyUI's own PixArt, which takes captions of different length one after the other."""
    with unset_fake_temporarily():
        import_host("cpu")
        model = _host_model(_own_kind, config, dtype).get_model({}, "")
    _fake_buffers(model)
    weights = {f"{name}": tensor for name, tensor in fake_weights(config, dtype).items()}
    model.diffusion_model.load_state_dict(weights, strict=False, assign=True)
    model.requires_grad_(False)
    captions = [fake((batch, n, config.caption_channels), model.get_dtype_inference()) for n in LENGTHS]

    def step(side):
        for caption in captions:
            size, ratio = fake((batch, 2)), fake((batch, 1))
            given = {"c_size": size, "c_ar": ratio} if config.micro_condition else {}
            latent = fake((batch, config.in_channels, side, side))
            model.apply_model(latent, fake((batch,)), c_crossattn=caption, **given)

    return step


def diffusers(config, dtype, batch=1):
    """diffusers' transformer as its pipeline feeds it: captions padded to the trained length, under a mask."""
    net = make_transformer(config, fake_weights(config, dtype)).eval().requires_grad_(False)
    net.pos_embed.pos_embed = fake(net.pos_embed.pos_embed.shape, dtype)
    rows, length = 2 * batch, config.caption_length
    states, mask = fake((rows, length, config.caption_channels), dtype), fake((rows, length), dtype)
    added = {"resolution": None, "aspect_ratio": None}
    if config.micro_condition:
        added = {"resolution": fake((rows, 2), dtype), "aspect_ratio": fake((rows, 1), dtype)}

    def step(side):
        return net(
            fake((rows, config.in_channels, side, side), dtype), encoder_hidden_states=states, timestep=fake((rows,)),
            encoder_attention_mask=mask, added_cond_kwargs=added, return_dict=False,
        )  # fmt: skip

    return step


PROGRAMS = {OURS: ours, ALONE: alone, HOST: comfyui, DIFFUSERS: diffusers}


def count_peak(config, dtype, side_px, batch=1, copies=0) -> tuple[int, int]:
    """Bytes alive at once while this pack samples in ComfyUI, and the host's own estimate.

    With what is made in the first step and kept. copies: of blocks of a ControlNet.
    """
    side, caption = side_px // LATENT_DOWNSCALE, [1, LENGTHS[0], config.caption_channels]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), pytorch_attention():
        step = ours(config, dtype, batch, copies)
        with Counter() as counter:
            step(side)
            step(side)
        with unset_fake_temporarily():
            import comfy.model_management

            from ..nodes.host.weights.memory import CONTROLS

        shapes = {"c_crossattn": [caption], CONTROLS: [[int(copies > 0), copies]]}
        with mock.patch.object(comfy.model_management, "pytorch_attention_flash_attention", lambda: True):
            estimate = step.model.memory_required([2 * batch, config.in_channels, side, side], cond_shapes=shapes)
    return counter.counts().peak, round(estimate)


def count(program, config, dtype, side_px, batch=1) -> Counts:
    """What a step of one of PROGRAMS is on a GPU; batch: pictures, each with a prompt and its negative."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        step = PROGRAMS[program](config, dtype, batch)
        side = side_px // LATENT_DOWNSCALE
        with pytorch_attention() if program in (OURS, HOST) else contextlib.nullcontext():
            step(side)
            with Counter() as counter:
                step(side)
    return counter.counts()


def count_whole(program, config, dtype, side_px, batch=1) -> Counts:
    """As `count`, from models of two and of three blocks: every block adds the same."""
    few, more = (count(program, dataclasses.replace(config, depth=depth), dtype, side_px, batch) for depth in (2, 3))
    return Counts(*(low + (config.depth - 2) * (high - low) for low, high in zip(few, more, strict=True)))


def main(arguments):
    """Count, and write results/count.json and .md."""
    from .count_training import describe_training

    parser = argparse.ArgumentParser(prog="benchmarks count", description=__doc__)
    parser.add_argument("--variant", choices=CONFIGS, default="alpha-1024")
    parser.add_argument("--sides-px", type=int, nargs="*", default=SIDES_PX)
    parser.add_argument("--dtypes", choices=DTYPES, nargs="*", default=list(DTYPES))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    found = []
    for name in options.dtypes:
        for side in options.sides_px:
            for program in PROGRAMS:
                if DTYPES[name].itemsize == 1 and program in (ALONE, DIFFUSERS):
                    continue  # they compute in the dtype of the weights
                try:
                    counts = count_whole(program, CONFIGS[options.variant], DTYPES[name], side)._asdict()
                except ZeroDivisionError:  # ComfyUI's own cannot draw less than half of what it was trained at
                    counts = {}
                found.append({"dtype": name, "side_px": side, "program": program, **counts})
                logger.info("%s %s px, %s: %s", name, side, program, counts or "fails")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "count.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = describe(options.variant, found) + describe_training()
    (options.out / "count.md").write_text(text, encoding="utf-8")


def describe(variant, found):
    """The results as Markdown."""
    rows = []
    for row in found:
        told = ["fails", "", "", "", ""]
        if "kernels" in row:
            touched, peak = f"{row['bytes'] / GB:.1f} GB", f"{row['peak'] / MIB:.0f} MiB"
            told = [row["kernels"], touched, row["casts"], row["copies"], peak]
        rows.append([row["dtype"], f"{row['side_px']} px", row["program"], *told])
    text = f"{variant}, a prompt and its negative, one picture. Every tensor that a kernel touches is counted once.\n\n"
    return text + markdown_table(
        ["weights", "picture", "program", "kernels", "memory touched", "casts", "copies", "activations"], rows
    )
