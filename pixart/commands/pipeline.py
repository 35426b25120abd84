"""Text to pictures without ComfyUI: the same model, solvers and conventions, in plain PyTorch."""

from collections.abc import Callable, Sequence

import torch

from ..acceleration.guidance_reuse import GuidanceReuse
from ..encoders.autoencoder import Autoencoder
from ..encoders.t5 import TextEncoder
from ..reference.attention import Reference, ReferencedModel
from ..reference.pictures import fit_reference
from ..sampling import Captions, Partners, Settings, sample_latents
from ..transformer import PixArt


class Pipeline:
    """A model with the text encoder and autoencoder that it needs."""

    def __init__(self, model: PixArt, text_encoder: TextEncoder, autoencoder: Autoencoder):
        self.model, self.text_encoder, self.autoencoder = model, text_encoder, autoencoder

    def encode(self, captions: Sequence[str]) -> Captions:
        """Captions cut to the model's length, on its device and in its dtype. Raises ValueError for another T5."""
        encoded = Captions.of(self.text_encoder(captions, self.model.config.caption_length))
        channels = self.model.config.caption_channels
        if encoded.states.shape[2] != channels:
            raise ValueError(
                f"Caption width mismatch: got {encoded.states.shape[2]}, expected {channels}. "
                f"Choose the T5 text encoder of this PixArt model (T5-XXL for the released ones)."
            )
        like = next(self.model.parameters())
        return Captions(encoded.states.to(like), encoded.mask.to(like.device))

    @torch.no_grad()
    def read_reference(self, pixels: torch.Tensor, **fields) -> Reference:
        """The reference of a picture (H, W, 3) in [0, 1]. fields: see Reference."""
        fitted = fit_reference(pixels.movedim(-1, 0)[None], self.model.config.base_px)
        mean, _ = self.autoencoder.encode(fitted * 2 - 1)
        latent = mean.float() * self.model.config.vae_scale
        return Reference.of(latent.to(next(self.model.parameters()).device), **fields)

    def generate(
        self,
        prompts: Sequence[str],
        negative: str,
        height_px: int,
        width_px: int,
        seeds: Sequence[int],
        settings: Settings,
        on_step: Callable[[dict], None] | None = None,
        reuse: GuidanceReuse | None = None,
        reference: Reference | None = None,
        partners: Partners | None = None,
    ) -> torch.Tensor:
        """One picture for each prompt, (B, H, W, 3) in [0, 1]. seeds, reuse, partners: see sample_latents."""
        model = self.model if reference is None else ReferencedModel(self.model, reference)
        positive = self.encode(prompts)
        unguided = self.encode([negative] * len(prompts))
        size = height_px, width_px
        latents = sample_latents(model, positive, unguided, *size, seeds, settings, on_step, True, reuse, partners)
        with torch.no_grad():
            pictures = [self.autoencoder.decode(latent[None]) for latent in latents]  # one by one: the largest memory
        return ((torch.cat(pictures).float() + 1) / 2).clamp(0, 1).movedim(1, -1).cpu()
