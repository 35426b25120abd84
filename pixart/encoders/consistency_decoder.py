"""The consistency decoder (DALL-E 3's) for latents of SD 1.5's autoencoder, by diffusers."""

import inspect
from collections.abc import Mapping
from pathlib import Path

import torch

from ..weights.folders import read_json
from ..weights.reading import read_tensors

CLASS_NAME = "ConsistencyDecoderVAE"
PARTS = ("decoder_unet.", "encoder.", "quant_conv.")
ENCODING = ("encoder", "quant_conv")
# Values for each pixel of the picture, by the network's first width: 15.0 live at once, counted over the published
# network's forward pass at two sizes; the rest is for what convolutions work in.
MAPS = 18


def load_consistency_decoder(path: str | Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """diffusers' ConsistencyDecoderVAE without its encoder, from its folder or from one file of its weights.

    path: of a file, config.json beside it gives the sizes; without one they are the published ones.
    Raises ImportError without diffusers, FileNotFoundError, and ValueError for other weights.
    """
    path = Path(path)
    try:
        from diffusers import ConsistencyDecoderVAE
    except ImportError as error:
        raise ImportError(
            "diffusers is missing: got no such package, expected it for the consistency decoder. "
            "Install it with 'pip install diffusers'."
        ) from error
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    config = config if config.get("_class_name") == CLASS_NAME else {}
    if path.is_dir() and not config:
        raise _wrong(path, "a folder of something else")
    weights = _read_weights(path)
    known = inspect.signature(ConsistencyDecoderVAE.__init__).parameters  # diffusers warns of its own other entries
    network = ConsistencyDecoderVAE.from_config({name: value for name, value in config.items() if name in known})
    for part in ENCODING:
        delattr(network, part)
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()  # it may name hundreds of keys
        raise _wrong(path, first if len(first) < 150 else f"{first[:150]}...") from error
    # Not diffusers' own .to(), which warns of half precision.
    return torch.nn.Module.to(network, dtype=dtype).eval().requires_grad_(False)


def decode(network: torch.nn.Module, latents: torch.Tensor, seed: int) -> torch.Tensor:
    """Latents (B, 4, h, w), unscaled -> pictures (B, 3, 8h, 8w), about [-1, 1].

    Each picture is decoded by itself from the noise of the seed, so that it is the same in any batch; and the memory
    is that of one.
    """
    return torch.cat(
        [network.decode(latent[None], generator=torch.Generator().manual_seed(seed)).sample for latent in latents]
    )


def memory_bytes(network: torch.nn.Module, height_latent: int, width_latent: int, dtype: torch.dtype) -> int:
    """What decoding one picture takes beside the weights, at the most."""
    width = network.config.decoder_block_out_channels[0]
    pixels = height_latent * width_latent * (2 ** (len(network.config.block_out_channels) - 1)) ** 2
    return pixels * width * MAPS * dtype.itemsize


def _read_weights(path: Path) -> Mapping[str, torch.Tensor]:
    weights, _ = read_tensors(path)
    if not all(name.startswith(PARTS) for name in weights) or not weights:
        raise _wrong(path, f"{len(weights)} tensors such as {next(iter(weights), 'none')}")
    return {name: tensor for name, tensor in weights.items() if not name.startswith(PARTS[1:])}


def _wrong(path: Path, got: str) -> ValueError:
    return ValueError(
        f"Not a consistency decoder: got {got} in '{path.name}', expected diffusers' {CLASS_NAME}. "
        f"Choose the folder or the diffusion_pytorch_model.safetensors of openai/consistency-decoder."
    )
