"""A tiny consistency decoder of random weights, of diffusers' own class."""

from pathlib import Path

import torch

SIZES = {
    "encoder_block_out_channels": (8, 8, 8, 8),
    "encoder_norm_num_groups": 4,
    "encoder_layers_per_block": 1,
    "decoder_block_out_channels": (16, 16, 32, 32),
    "decoder_norm_num_groups": 4,
    "decoder_layers_per_block": 1,
}


def make_consistency_decoder(seed: int = 0):
    from diffusers import ConsistencyDecoderVAE

    torch.manual_seed(seed)
    return ConsistencyDecoderVAE(**SIZES).eval()


def write_consistency_decoder(folder: Path, seed: int = 0):
    """Saves it as a diffusers folder and returns it."""
    network = make_consistency_decoder(seed)
    network.save_pretrained(folder)
    return network
