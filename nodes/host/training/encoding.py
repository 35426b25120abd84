"""Encodes training data with the host's CLIP and VAE, under its memory management, progress and interruption."""

import re
from collections.abc import Callable
from dataclasses import replace

import comfy.model_management
import torch

from ....pixart.data.cache import DatasetEncoder, EncodeSettings
from ....pixart.data.features import CachedFeatures
from ....pixart.data.identity import digest, fingerprint
from ....pixart.data.records import Dataset
from ....pixart.data.storage.index import MANIFEST
from ....pixart.data.storage.table import RecordTable
from ....pixart.quoting import shorten
from ..denoiser.latent import CHANNELS
from ..edges import AUTO, METHODS, make_edges
from ..folders import output_folder
from ..progress import show_progress
from ..server.users import own_output
from ..text.captions import check_caption_width, count_tokens, encode_captions, pixart_config

CACHE_FOLDER = "pixart_cache"  # below the output folder
CONTROL_FILES = "control pictures"
CONTROL_METHODS = ("none", CONTROL_FILES, *METHODS)
_LOGVAR_LIMITS = (-30.0, 20.0)  # of the autoencoder's own posterior
_PROBE_CAPTION = "A photo of 2 cats, naïve (and old): «x»"
_PROBE_PX = 64


def read_sizes(text: str) -> tuple[int, ...]:
    """Sizes in pixels out of a text with commas or spaces between them. Raises ValueError for anything else."""
    words = text.replace(",", " ").split()
    if not all(re.fullmatch(r"[0-9]{2,4}", word) for word in words):
        raise ValueError(
            f"Sizes cannot be read: got {shorten(text)}, expected numbers of pixels such as '256, 1024'. Correct them."
        )
    return tuple(map(int, words))


def settings_for(model, base_px: int, caption_length: int, **settings) -> EncodeSettings:
    """EncodeSettings, with what is 0 taken from the MODEL. Raises ValueError when there is none to take it from."""
    if model is None and not (base_px and caption_length):
        raise ValueError(
            "Not connected: got no model, with resolution or caption_length 0, expected the model that is to be "
            "trained. Connect it, or enter both numbers."
        )
    config = None if model is None else pixart_config(model)
    return EncodeSettings(base_px or config.base_px, caption_length=caption_length or config.caption_length, **settings)


def encode_dataset(
    dataset: Dataset,
    clip,
    vae,
    settings: EncodeSettings,
    *,
    model=None,
    control: str = CONTROL_FILES,
    hed_model: str = AUTO,
    batch_size: int = 1,
    name: str = "dataset",
) -> CachedFeatures:
    """Encode a Dataset into the cache `name`; then CLIP and VAE leave the graphics memory.

    model: a MODEL, or None; its captions' width is checked. control: of CONTROL_METHODS. Interrupted, what is done
    stays. Raises ValueError for a CLIP or VAE of another kind before anything is encoded.
    """
    if getattr(vae, "latent_channels", CHANNELS) != CHANNELS:
        raise ValueError(
            f"Wrong autoencoder: got {vae.latent_channels} latent channels, expected {CHANNELS}. Connect the VAE of "
            f"PixArt: sd-vae-ft-ema for alpha, the SDXL VAE for Sigma."
        )
    make_hint = _edge_maker(control, hed_model)
    if control != CONTROL_FILES:
        dataset = replace(dataset, records=RecordTable(replace(each, control=None) for each in dataset.records))
    place = output_folder(name.strip(), own_output(CACHE_FOLDER))
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # captions lie in it
    encoder = DatasetEncoder(
        dataset.records,
        place,
        settings,
        text_identity=_identify_clip(clip),
        image_identity=digest(_identify(vae.patcher), str(vae.vae_dtype)),
        hint_identity=_identify_edges(make_hint) if make_hint else "",
        progress=show_progress(len(dataset)),
    )
    captions, pictures = len(encoder.missing_captions), len(encoder.missing_pictures)
    total = captions + pictures
    try:
        encoder.encode_captions(_caption_encoder(clip, settings.caption_length, model), show_progress(total))
        encoder.encode_pictures(_picture_encoder(vae), batch_size, make_hint, show_progress(total, captions))
    finally:
        unload(clip.patcher, vae.patcher)
    return encoder.features(MANIFEST, encoder.describe_cut(lambda text: count_tokens(clip, text)))


def unload(*patchers) -> None:
    """Take models out of the graphics memory, and leave the others there."""
    management = comfy.model_management
    keep = [
        loaded
        for loaded in management.current_loaded_models
        if loaded.model is not None and not any(patcher.is_clone(loaded.model) for patcher in patchers)
    ]
    for device in {patcher.load_device for patcher in patchers}:
        management.free_memory(1e30, device, keep_loaded=keep)
    management.soft_empty_cache()


def _caption_encoder(clip, caption_length: int, model) -> Callable:
    config = None if model is None else pixart_config(model)

    def encode(captions: list[str]) -> list[torch.Tensor]:
        states = []
        for caption in captions:
            comfy.model_management.throw_exception_if_processing_interrupted()
            # A dataset's captions have a cache of their own, and would drive the user's prompts out of theirs.
            conditioning, _ = encode_captions(clip, [caption], caption_length, keep=False)
            if config:
                check_caption_width(conditioning, config)
            states.append(conditioning[0][0][0])
        return states

    return encode


def _picture_encoder(vae) -> Callable:
    """A function of pictures to (mean, deviation); the deviation is None for autoencoders without a posterior."""
    posterior = getattr(vae.first_stage_model, "regularization", None)

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        moments: list[torch.Tensor] = []
        if posterior is None:
            return vae.encode(pixels), None
        watch = posterior.register_forward_pre_hook(lambda _, inputs: moments.append(inputs[0].float().cpu()))
        try:
            latents = vae.encode(pixels)
        finally:
            watch.remove()
        if sum(map(len, moments)) != len(pixels) or moments[0].shape[1:] != (2 * CHANNELS, *latents.shape[2:]):
            return latents, None  # without memory for the whole picture the host encodes it in tiles
        mean, logvar = torch.cat(moments).chunk(2, dim=1)
        return mean, logvar.clamp(*_LOGVAR_LIMITS).mul(0.5).exp()

    return encode


def _edge_maker(control: str, hed_model: str) -> Callable | None:
    if control not in CONTROL_METHODS:
        raise ValueError(
            f"Unknown control method: got '{control}', expected one of {', '.join(CONTROL_METHODS)}. Choose one."
        )
    if control not in METHODS:
        return None
    return lambda pixels: make_edges(pixels, control, hed_model).to(pixels.device)


def _identify_edges(make_hint: Callable) -> str:
    """By the edges of a drawn probe, which asks the detector's file to be there before anything is encoded."""
    down, across = torch.meshgrid(torch.arange(_PROBE_PX), torch.arange(_PROBE_PX), indexing="ij")
    probe = torch.stack([(down * across % 7 < 3).float(), (down > across).float(), across / _PROBE_PX], -1)
    edges = make_hint(probe[None]).float().cpu()
    return digest(edges.mul(32).round().to(torch.uint8).numpy().tobytes())  # coarse: devices round differently


def _identify_clip(clip) -> str:
    tokens = {name: [pair[0] for row in rows for pair in row] for name, rows in clip.tokenize(_PROBE_CAPTION).items()}
    return digest(_identify(clip.patcher), str(tokens), str(clip.layer_idx))


def _identify(patcher) -> str:
    """A model's identity: its weights as they were loaded, and the patches on them."""
    tensors = []
    for name, tensor in patcher.model_state_dict().items():
        backup = patcher.backup.get(name)  # what stood there before a patch was computed into it
        tensors.append((name, tensor if backup is None else backup.weight))
    for name, patches in patcher.patches.items():
        tensors += [(f"{name} {place}", value) for place, value in _tensors_in(patches)]
    return fingerprint((name, _plain(tensor)) for name, tensor in tensors)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Quantised weights of the host's own class as numbers."""
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return tensor if is_plain else tensor.dequantize()


def _tensors_in(value, place: str = "") -> list[tuple[str, torch.Tensor]]:
    """Tensors and numbers anywhere in a patch: tuples, lists, and the host's adapters with their `weights`."""
    if isinstance(value, torch.Tensor):
        return [(place, value)]
    if isinstance(value, int | float):
        return [(place, torch.tensor(float(value)))]
    inner = value if isinstance(value, list | tuple) else getattr(value, "weights", ())
    if not isinstance(inner, list | tuple):
        return []
    return [found for index, part in enumerate(inner) for found in _tensors_in(part, f"{place}.{index}")]
