"""What each stage of a picture takes at once: weights counted from their shapes, activations as ComfyUI estimates.

Nothing is run, so it holds for a card that is not there. A stage's weights may leave before the next one's come:
tests/host/test_memory_host.py shows that ComfyUI does so when they do not fit together.
"""

import argparse
import json
import logging
import math
from pathlib import Path
from unittest import mock

import torch
from transformers import T5Config, T5EncoderModel

from ..pixart.checkpoint import expected_shapes
from ..pixart.config import CONFIGS
from ..pixart.config import LATENT_DOWNSCALE as DOWNSCALE
from .host import import_host
from .report import RESULTS, markdown_table

T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
VAE_WEIGHTS = 83_653_863  # of SD's and SDXL's autoencoder
SIDES_PX, TILE_PX = (512, 1024, 2048), 512
GIB = 2**30

logger = logging.getLogger(__name__)


def count_t5():
    """(weights of T5 v1.1 XXL's encoder, those of its largest layer)."""
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(vocab_size=32128, **T5_XXL))
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.encoder.block]
    return sum(p.numel() for p in model.parameters()), max(blocks)


def count_transformer(variant):
    """(weights of the transformer, those of one block)."""
    shapes = expected_shapes(CONFIGS[variant])
    block = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("blocks.0."))
    return sum(math.prod(shape) for shape in shapes.values()), block


def estimate_activations(variant, side_px, dtype=torch.float16):
    """Bytes that ComfyUI keeps free to sample side_px with guidance, under PyTorch's attention on a GPU."""
    import_host()
    import comfy.model_management

    from ..nodes.host.denoiser.model import PixArtModelConfig

    config = PixArtModelConfig(CONFIGS[variant])
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device=torch.device("meta"))
    side = side_px // DOWNSCALE
    with mock.patch.object(comfy.model_management, "pytorch_attention_flash_attention", lambda: True):
        return model.memory_required((2, CONFIGS[variant].in_channels, side, side))


def count_activations(variant, side_px, itemsize=2):
    """Bytes alive at once in a block, with guidance: the tokens, the modulated ones, and four times as many."""
    config = CONFIGS[variant]
    tokens = (side_px // DOWNSCALE // config.patch_size) ** 2
    return 2 * tokens * config.hidden_size * (2 + round(config.mlp_ratio)) * itemsize


def estimate_decoding(side_px, dtype=torch.float16):
    """Bytes that ComfyUI keeps free to decode a picture of side_px by the autoencoders of SD and SDXL."""
    side = side_px // DOWNSCALE
    return 2178 * side * side * 64 * dtype.itemsize


def measure(variant):
    """(stage, bytes of weights, bytes of activations) of every stage."""
    t5, t5_layer = count_t5()
    net, net_block = count_transformer(variant)
    rows = [(f"T5-XXL, {name}", t5 * size, 0) for name, size in (("fp16", 2), ("fp8", 1))]
    rows.append(("T5-XXL, fp16, layer by layer", 2 * t5_layer, 0))
    for side in SIDES_PX:
        needed = estimate_activations(variant, side)
        rows += [(f"transformer, {name}, {side} px", net * size, needed) for name, size in (("fp16", 2), ("fp8", 1))]
    rows.append((f"transformer, fp16, {SIDES_PX[-1]} px, block by block", 2 * net_block, needed))
    rows += [(f"VAE, fp16, {side} px", 2 * VAE_WEIGHTS, estimate_decoding(side)) for side in SIDES_PX]
    rows.append((f"VAE, fp16, any size in tiles of {TILE_PX} px", 2 * VAE_WEIGHTS, estimate_decoding(TILE_PX)))
    return rows


def main(arguments):
    """Count, and write results/memory.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks memory", description=__doc__)
    parser.add_argument("--variant", choices=CONFIGS, default="sigma-1024")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    rows = measure(options.variant)
    cells = [
        [stage, *(f"{n / GIB:.2f}" for n in (weights, needed, weights + needed))] for stage, weights, needed in rows
    ]
    text = f"{options.variant}, GiB, counted and estimated, not measured:\n\n"
    text += markdown_table(["stage", "weights", "activations", "together"], cells)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (options.out / "memory.md").write_text(text, encoding="utf-8")
    logger.info("%s", text)


if __name__ == "__main__":
    main(None)
