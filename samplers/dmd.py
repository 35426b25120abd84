"""DMD: one step of distribution matching distillation. Source: arXiv 2311.18828; PixArt-DMD takes it at t = 400."""

from .contract import Denoiser, check_sigmas, steps


def sample_dmd(model, x, sigmas, extra_args=None, callback=None, disable=None, pure_noise=True):
    """Denoise once.

    model(x, sigma, **extra_args) -> denoised. x: (B, C, H, W), variance exploding. sigmas: one noise level and 0.
    pure_noise: x is sigma * noise without a picture. The generator was distilled on noise of unit variance, so it is
        scaled to that; False leaves x as it is (image-to-image).
    Returns the denoised latent.
    """
    levels = check_sigmas(sigmas)
    if len(levels) != 2 or levels[-1] != 0.0:
        raise ValueError(
            f"DMD takes one step to sigma 0: got {len(levels) - 1} steps to sigma {levels[-1]:g}, expected 1 to 0. "
            "Connect the PixArt scheduler set to dmd."
        )
    x = x * (1.0 + levels[0] ** -2) ** 0.5 if pure_noise else x
    denoise = Denoiser(model, levels, extra_args, callback)
    for i in steps(levels, disable):
        x = denoise(x, i)
    return x
