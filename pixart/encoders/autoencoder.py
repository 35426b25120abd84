"""Autoencoders outside ComfyUI, by diffusers: pictures to latents and back."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..files.inside import check_folder
from ..quoting import plain, shorten
from ..weights.folders import TRANSFORMER_STEMS, find_weights, read_json
from ..weights.layouts import describe
from ..weights.reading import read_tensors
from ..weights.wrappers import detect_layout

LATENT_CHANNELS = 4
TINY_CLASS = "AutoencoderTiny"
TINY_DECODER, TINY_ENCODER = "taesd_decoder.", "taesd_encoder."
TINY_SCALE, TINY_SHIFT = "vae_scale", "vae_shift"  # what ComfyUI's files of this layout hold beside the weights
MOST_UNITS = 2**14  # channels, layers or pixels that a config.json declares
# The autoencoder of SD 1.5 and SDXL alike. Source: diffusers, AutoencoderKL's published configurations.
KL_CONFIG = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": LATENT_CHANNELS,
    "sample_size": 512,
}


@dataclass(frozen=True)
class Autoencoder:
    """encode: pictures (B, 3, 8h, 8w) in [-1, 1] -> (mean, deviation) of the latents, (B, 4, h, w) each; deviation
    None where there is none. decode: latents (B, 4, h, w) -> (B, 3, 8h, 8w). Latents are not scaled."""

    encode: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
    decode: Callable[[torch.Tensor], torch.Tensor]


def load_autoencoder(path: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> Autoencoder:
    """The autoencoder of a diffusers folder or of a file: AutoencoderKL in either layout, or TAESD's.

    Raises ImportError without diffusers, FileNotFoundError, and ValueError for a file of another kind.
    """
    path = Path(path)
    diffusers = _import_diffusers()
    if path.is_dir():
        kind = getattr(diffusers, str(read_json(path / "config.json").get("_class_name")), None)
        if kind not in (diffusers.AutoencoderKL, diffusers.AutoencoderTiny):
            raise ValueError(
                f"Not an autoencoder folder: got {path.name}, expected AutoencoderKL or AutoencoderTiny in its "
                f"config.json. Choose the vae folder of the pipeline."
            )
        network = _from_folder(kind, path)
    else:
        network = _from_file(diffusers, path)
    network = torch.nn.Module.to(network, device, dtype).eval().requires_grad_(False)  # diffusers' own .to() warns
    scale, shift = getattr(network, TINY_SCALE, 1.0), getattr(network, TINY_SHIFT, 0.0)

    def decode(latent):
        return network.decode(((latent - shift) * scale).to(network.device, network.dtype)).sample

    return Autoencoder(_encoder(network, scale, shift), decode)


def _import_diffusers():
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            "diffusers is missing: got no such package, expected it for the autoencoder outside ComfyUI. "
            "Install it with 'pip install diffusers'."
        ) from error
    return diffusers


def _from_folder(kind, folder: Path):
    """By diffusers where it finds safetensors; other weights are read here first, so that it reads no pickles, and
    needs no word of a variant.
    """
    check_folder(folder)
    files, _ = find_weights(folder, TRANSFORMER_STEMS)
    _require_measured(read_json(folder / "config.json"), folder.name)
    if all(file.name == f"{TRANSFORMER_STEMS[0]}.safetensors" for file in files):
        return _whole(kind, folder, folder.name)
    with tempfile.TemporaryDirectory() as place:
        weights = {name: tensor.contiguous() for name, tensor in read_tensors(folder)[0].items()}
        save_file(weights, Path(place, f"{TRANSFORMER_STEMS[0]}.safetensors"), {"format": "pt"})
        Path(place, "config.json").write_text(json.dumps(read_json(folder / "config.json")), encoding="utf-8")
        return _whole(kind, Path(place), folder.name)


def _require_measured(config: dict, name: str) -> None:
    """Raises ValueError for numbers of a config.json that no autoencoder has, before a network of them is made."""
    for key, value in config.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int) and abs(each) > MOST_UNITS or isinstance(value, list) and len(value) > 64:
                raise ValueError(
                    f"Oversized autoencoder: got {shorten(key)} {shorten(value)} in the config.json of '{name}', "
                    f"expected at most {MOST_UNITS} of anything. Download it again."
                )


def _whole(kind, folder: Path, name: str):
    """diffusers' network of a folder. Raises ValueError where weights are missing, of which it would but warn."""
    network, found = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, output_loading_info=True)
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"Not a whole autoencoder: got {len(missing)} weights too few in '{name}', such as {shorten(missing[0])}, "
            f"expected all of {kind.__name__}. Download it again."
        )
    return network


def _from_file(diffusers, path: Path):
    weights, _ = read_tensors(path)
    if any(name.startswith(TINY_DECODER) for name in weights):
        return _tiny(diffusers, weights, path)
    if "decoder.conv_in.weight" not in weights and "first_stage_model.decoder.conv_in.weight" not in weights:
        raise ValueError(
            f"Not an autoencoder: got {describe(detect_layout(weights))} in {path.name}, expected a VAE of "
            f"{LATENT_CHANNELS} latent channels. Choose sd-vae-ft-ema for alpha, the SDXL VAE for Sigma."
        )
    with tempfile.TemporaryDirectory() as folder:  # diffusers asks for a folder, and would else look on the network
        diffusers.AutoencoderKL.from_config(KL_CONFIG).save_config(folder)
        return diffusers.AutoencoderKL.from_single_file(weights, config=folder, local_files_only=True)


def _tiny(diffusers, weights: dict, path: Path):
    """TAESD's own names -> AutoencoderTiny, whose decoder has its first layer (a clamp without weights) elsewhere."""
    state = {}
    for name, tensor in weights.items():
        for prefix, part, shift in ((TINY_ENCODER, "encoder", 0), (TINY_DECODER, "decoder", 1)):
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                state[f"{part}.layers.{int(number) - shift}.{rest}"] = tensor.float()
    network = diffusers.AutoencoderTiny()
    for name in (TINY_SCALE, TINY_SHIFT):
        if name in weights:
            setattr(network, name, float(weights[name]))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"Not a TAESD of {LATENT_CHANNELS} latent channels: got "
            f"{plain(str(error).splitlines()[1].strip(), 200)} in {path.name}, expected its encoder "
            f"and decoder. Choose another autoencoder."
        ) from error
    return network


def tiny_weights(state_dict: dict) -> dict:
    """The weights of diffusers' AutoencoderTiny under TAESD's own names, as ComfyUI reads them."""
    renamed = {}
    for name, tensor in state_dict.items():
        part, _, inner = name.partition(".layers.")
        number, _, rest = inner.partition(".")
        prefix, shift = {"encoder": (TINY_ENCODER, 0), "decoder": (TINY_DECODER, 1)}.get(part, ("", 0))
        renamed[f"{prefix}{int(number) + shift}.{rest}" if prefix and number.isdecimal() else name] = tensor
    return renamed


def _encoder(network, scale: float, shift: float) -> Callable:
    def encode(pictures):
        pictures = pictures.to(network.device, network.dtype)
        encoded = network.encode(pictures)
        if hasattr(encoded, "latents"):
            return encoded.latents / scale + shift, None
        return encoded.latent_dist.mean, encoded.latent_dist.std

    return encode
