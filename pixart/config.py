"""The shape of every released PixArt: one frozen dataclass and one table."""

import re
from dataclasses import dataclass

ALPHA, SIGMA = "alpha", "sigma"  # the families
ALPHA_VAE_SCALE = 0.18215
SIGMA_VAE_SCALE = 0.13025
ALPHA_CAPTION_LENGTH = 120
SIGMA_CAPTION_LENGTH = 300
LATENT_DOWNSCALE = 8  # pixels per latent pixel, the same for every PixArt autoencoder


@dataclass(frozen=True)
class PixArtConfig:
    """Hyper-parameters of one PixArt; every default is PixArt-XL/2 1024-MS's value.

    base_size: tokens per side at the trained size (base_px / 8 / patch_size).
    pe_scale: divisor of the position grid ("lewei_scale", "pe_interpolation").
    kv_compress_layers: indices of the blocks whose keys and values are compressed.
    vae_scale: factor between the autoencoder's latent and the model's.
    Raises ValueError when the numbers cannot make a model.
    Source: PixArt-alpha, arXiv 2310.00426, section 2.3; PixArt-Sigma, arXiv 2403.04692, section 3.
    """

    depth: int = 28
    hidden_size: int = 1152
    num_heads: int = 16
    patch_size: int = 2
    in_channels: int = 4
    mlp_ratio: float = 4.0
    caption_channels: int = 4096
    caption_length: int = ALPHA_CAPTION_LENGTH
    learn_sigma: bool = True
    micro_condition: bool = True
    base_size: int = 64
    pe_scale: float = 2.0
    qk_norm: bool = False
    kv_compress_ratio: int = 1
    kv_compress_layers: tuple[int, ...] = ()
    vae_scale: float = ALPHA_VAE_SCALE

    def __post_init__(self):
        object.__setattr__(self, "kv_compress_layers", tuple(self.kv_compress_layers))
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"Attention width mismatch: got hidden_size {self.hidden_size} with {self.num_heads} heads, "
                f"expected a multiple. Choose num_heads so that it divides hidden_size."
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"Position grid width mismatch: got hidden_size {self.hidden_size}, expected a multiple of 4 "
                f"(sine and cosine of two axes). Choose another hidden_size."
            )
        if self.micro_condition and self.hidden_size % 3:
            raise ValueError(
                f"Size embedder width mismatch: got hidden_size {self.hidden_size}, expected a multiple of 3 "
                f"(height, width, aspect ratio). Choose another hidden_size or turn micro_condition off."
            )

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: noise, and as many of variance when learn_sigma."""
        return self.in_channels * 2 if self.learn_sigma else self.in_channels

    @property
    def base_px(self) -> int:
        """Side of the square picture that the model was trained at, in pixels."""
        return self.base_size * self.patch_size * LATENT_DOWNSCALE

    @property
    def is_sigma(self) -> bool:
        """True for the Sigma family, read from its autoencoder's scale."""
        return abs(self.vae_scale - SIGMA_VAE_SCALE) < 1e-4


def _alpha(base_px: int, pe_scale: float, micro_condition: bool) -> PixArtConfig:
    return PixArtConfig(base_size=base_px // 16, pe_scale=pe_scale, micro_condition=micro_condition)


def _sigma(base_px: int, pe_scale: float) -> PixArtConfig:
    return PixArtConfig(
        base_size=base_px // 16,
        pe_scale=pe_scale,
        micro_condition=False,
        caption_length=SIGMA_CAPTION_LENGTH,
        vae_scale=SIGMA_VAE_SCALE,
    )


CONFIGS = {
    "alpha-256": _alpha(256, 1.0, micro_condition=False),
    "alpha-512": _alpha(512, 1.0, micro_condition=False),
    "alpha-1024": _alpha(1024, 2.0, micro_condition=True),
    "sigma-256": _sigma(256, 0.5),
    "sigma-512": _sigma(512, 1.0),
    "sigma-1024": _sigma(1024, 2.0),
    "sigma-2048": _sigma(2048, 4.0),
}

# Released file or folder name -> row of CONFIGS. Files that share a row differ in their weights alone.
RELEASES = {
    "PixArt-XL-2-SAM-256x256": "alpha-256",
    "PixArt-XL-2-256x256": "alpha-256",
    "PixArt-XL-2-256x256-MSCOCO-FID732": "alpha-256",
    "PixArt-XL-2-512x512": "alpha-512",
    "PixArt-Alpha-DMD-XL-2-512x512": "alpha-512",
    "PixArt-XL-2-512-ControlNet": "alpha-512",
    "PixArt-XL-2-1024-MS": "alpha-1024",
    "PixArt-LCM-XL-2-1024-MS": "alpha-1024",
    "PixArt-XL-2-1024-ControlNet": "alpha-1024",
    "PixArt-Sigma-XL-2-256x256": "sigma-256",
    "PixArt-Sigma-XL-2-512-MS": "sigma-512",
    "PixArt-Sigma-XL-2-1024-MS": "sigma-1024",
    "PixArt-Sigma-XL-2-2K-MS": "sigma-2048",
}


def read_name(name: str) -> tuple[str | None, int | None]:
    """(family, trained size in px) as a file or folder name gives them; None for what it does not give."""
    lowered = name.lower()
    known = [release for release in RELEASES if release.lower() in lowered]
    if known:
        row = RELEASES[max(known, key=len)]
        return row.split("-")[0], CONFIGS[row].base_px
    sizes = re.findall(r"(?<![0-9])(256|512|1024|2048|[12]k)(?![0-9a-z])", lowered.replace("px", "").replace("x", " "))
    size = {"1k": "1024", "2k": "2048"}.get(sizes[-1], sizes[-1]) if sizes else None
    family = SIGMA if "sigma" in lowered else ALPHA if re.search("alpha|pixart-xl|lcm|dmd", lowered) else None
    return family, int(size) if size else None
