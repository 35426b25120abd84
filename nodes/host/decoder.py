"""The consistency decoder as the host's VAE: it decodes, the normal VAE encodes."""

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from ...pixart.encoders.consistency_decoder import CLASS_NAME, decode, load_consistency_decoder, memory_bytes
from .denoiser.latent import CHANNELS
from .folders import find_file, find_folder, find_folders, list_files
from .loading import class_name

FILE_KINDS, FOLDER_KINDS = ("vae",), ("vae", "diffusers")


def list_consistency_decoders() -> list[str]:
    """What Load Consistency Decoder offers: folders that are one first, then the files of models/vae."""
    return [*find_folders(FOLDER_KINDS, _is_decoder_folder), *list_files(FILE_KINDS)]


def load_consistency_vae(name: str, vae: comfy.sd.VAE, seed: int, model=None) -> "ConsistencyVAE":
    """One of list_consistency_decoders with a VAE of PixArt-alpha for encoding. model: a MODEL that it must suit.

    Raises FileNotFoundError, and ValueError for other weights, another VAE or a model of PixArt-Sigma.
    """
    config = None if model is None else getattr(model.model, "pixart_config", None)
    if config is not None and config.is_sigma:
        raise ValueError(
            "Decoder of another family: got a PixArt-Sigma model, expected PixArt-alpha, whose latents the consistency "
            "decoder was trained on. Use the SDXL VAE for this model."
        )
    if vae.latent_channels != CHANNELS or vae.latent_dim != 2:
        raise ValueError(
            f"Wrong VAE: got one of {vae.latent_channels} latent channels, expected {CHANNELS}. Connect sd-vae-ft-ema."
        )
    is_folder = name.endswith("/")
    path = find_folder(FOLDER_KINDS, _is_decoder_folder, name) if is_folder else find_file(FILE_KINDS, name)
    return ConsistencyVAE(vae, load_consistency_decoder(path, vae.vae_dtype), seed)


class ConsistencyVAE(comfy.sd.VAE):
    """A VAE that decodes by the consistency decoder, and encodes by the VAE it was made of."""

    def __init__(self, source: comfy.sd.VAE, network: torch.nn.Module, seed: int):
        # All that the host keeps in a VAE is as in the other; its own constructor would look for weights.
        self.__dict__.update(source.__dict__)
        self._source = source
        self.first_stage_model = _Decoder(network, seed)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model,
            load_device=self.device,
            offload_device=comfy.model_management.vae_offload_device(),
        )
        self.size = None
        self.model_size()
        self.disable_offload = True  # its layers are not the host's, which alone can be loaded in parts
        self.upscale_ratio, self.output_channels, self.handles_tiling = 8, 3, False
        self.process_output = _to_unit_range
        self.memory_used_decode = lambda shape, dtype: memory_bytes(network, *shape[-2:], dtype)

    def encode(self, pixel_samples):
        """As the VAE that it was made of."""
        return self._source.encode(pixel_samples)

    def encode_tiled(self, pixel_samples, **tiles):
        """As the VAE that it was made of."""
        return self._source.encode_tiled(pixel_samples, **tiles)


class _Decoder(torch.nn.Module):
    """What the host calls to decode. It also holds the network for it, whose class refuses to be given a device."""

    def __init__(self, network: torch.nn.Module, seed: int):
        super().__init__()
        self.network, self.seed = network, seed

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w) -> (B, 3, 8h, 8w). Interruptible between pictures and tiles."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return decode(self.network, latents, self.seed)


def _to_unit_range(pictures: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> [0, 1], in place, as the host counts on."""
    return pictures.add_(1.0).div_(2.0).clamp_(0.0, 1.0)


def _is_decoder_folder(folder: Path) -> bool:
    return class_name(folder) == CLASS_NAME
