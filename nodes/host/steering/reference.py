"""A reference picture on the host's model: its keys and values beside those of the picture that is sampled."""

import comfy.patcher_extension

from ....pixart.reference.attention import Reader, Recorder, Reference
from ....pixart.reference.pictures import fit_reference
from ..denoiser.block_cache import BLOCK_CACHE
from ..denoiser.compilation import COMPILED
from ..denoiser.model import REFERENCE, VARIANCE_SINK
from ..text.captions import pixart_config

WRAPPER = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL


def add_reference(model, image, vae, strength, start_percent, end_percent, seed=0):
    """A clone of the MODEL whose pictures attend to an image between two percents of the sampling; exactly the MODEL
    at strength 0. Several add up.

    image: (1, H, W, 3), or one for each picture. seed: of the noise on it.
    Raises ValueError for an empty interval, another model, or a VAE of another number of channels.
    """
    config = pixart_config(model)
    if start_percent >= end_percent:
        raise ValueError(
            f"Empty interval: got start {start_percent:g} and end {end_percent:g}, expected the start first. Set "
            f"start_percent below end_percent."
        )
    patched = model.clone()
    if strength == 0:
        return patched
    pixels = fit_reference(image[..., :3].movedim(-1, 1), config.base_px).movedim(1, -1)
    latent = model.model.latent_format.process_in(vae.encode(pixels))
    if latent.shape[1] != config.in_channels:
        raise ValueError(
            f"VAE of another model: got {latent.shape[1]} latent channels, expected {config.in_channels}. Connect the "
            f"VAE of this PixArt model."
        )
    reference = Reference.of(latent, seed, strength=strength)
    sampling = patched.get_model_object("model_sampling")
    always = start_percent <= 0 and end_percent >= 1
    first, last = (float(sampling.percent_to_sigma(percent)) for percent in (start_percent, end_percent))

    def forward(executor, x, timesteps, context, control=None, transformer_options=None, **conds):
        options = {} if transformer_options is None else transformer_options
        sigmas, placed = options.get("sigmas"), options.get(REFERENCE, ())
        # To look at the noise level is to wait for the device.
        is_read = always or last <= float(sigmas.flatten()[0]) <= first
        if not is_read or any(isinstance(each, Recorder) for each in placed):
            return executor(x, timesteps, context, control, options, **conds)
        plain = {name: value for name, value in options.items() if name != COMPILED}
        recorder = Recorder()
        alone = {name: value for name, value in plain.items() if name not in (BLOCK_CACHE, VARIANCE_SINK)}
        noisy = reference.to(x.device).noised(sigmas, len(x)).to(x)
        own_size = {**conds, "c_size": None, "c_ar": None}
        executor(noisy, timesteps, context, None, {**alone, REFERENCE: (recorder,)}, **own_size)
        reader = Reader(recorder.keys, strength)
        return executor(x, timesteps, context, control, {**plain, REFERENCE: (*placed, reader)}, **conds)

    patched.add_wrapper_with_key(WRAPPER, REFERENCE, forward)
    return patched
