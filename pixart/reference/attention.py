"""Self-attention that also reads the tokens of a reference picture, noised as far as the picture itself is.

Both pass the same network under the same caption; in every block the reference's keys and values stand beside the
picture's own. Source: reference-only control (Mikubill, sd-webui-controlnet, 2023), as the originals' pipeline has it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ..diffusion import TRAIN_STEPS, alphas_cumprod
from ..layers import tile_rows
from ..transformer import BlockInputs, PixArt

Keys = dict[int, tuple[torch.Tensor, torch.Tensor]]  # block -> keys and values of the reference, (B, M, D)


@dataclass(frozen=True)
class Recorder:
    """Keeps what the blocks' self-attentions read, as a pass of the reference goes on."""

    keys: Keys = field(default_factory=dict)

    def place(self, inputs: BlockInputs, index: int) -> BlockInputs:
        """The inputs of block `index` whose self-attention is kept."""
        attention = inputs.self_attention

        def recording(q, k, v, num_heads, mask=None):
            self.keys[index] = k, v
            return _call(attention, q, k, v, num_heads, mask)

        return inputs._replace(self_attention=recording, run=None)


@dataclass(frozen=True)
class Reader:
    """Puts the kept keys and values beside a picture's own.

    strength: how much each of the reference's tokens counts, as a factor of its weight in the attention's sum; 1 is as
    much as one of the picture's own.
    """

    keys: Keys
    strength: float = 1.0

    def place(self, inputs: BlockInputs, index: int) -> BlockInputs:
        """The inputs of block `index` whose self-attention reads the reference as well."""
        attention, kept = inputs.self_attention, self.keys.get(index)
        if kept is None:
            return inputs

        def reading(q, k, v, num_heads, mask=None):
            more = [tile_rows(each, len(q)).to(k) for each in kept]
            mask = self._bias(q, k.shape[1], more[0].shape[1], mask)
            k, v = torch.cat([k, more[0]], 1), torch.cat([v, more[1]], 1)
            return _call(attention, q, k, v, num_heads, mask)

        return inputs._replace(self_attention=reading, run=None)

    def _bias(self, q, own, more, mask):
        """What is added to the logits of own and further tokens: (1 or B, 1, 1, own + more), or None for nothing."""
        if self.strength == 1 and mask is None:
            return None
        rows = q.new_zeros(1, 1, 1, own) if mask is None else mask
        return torch.cat([rows, rows.new_full((*rows.shape[:3], more), math.log(self.strength))], 3)


def _call(attention, q, k, v, num_heads, mask):
    return attention(q, k, v, num_heads) if mask is None else attention(q, k, v, num_heads, mask=mask)


@dataclass(frozen=True)
class Reference:
    """A reference picture and how it is used.

    latent: (1 or B, C, h, w) fp32, scaled as the model's; of any size. noise: of its shape. strength: see Reader; 0 is
    off. start, end: the part of the sampling in which it is read, as shares of the timesteps.
    """

    latent: torch.Tensor
    noise: torch.Tensor
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    @classmethod
    def of(cls, latent: torch.Tensor, seed: int = 0, **fields) -> "Reference":
        """One with the noise of a seed, alike for all its pictures; so a batch is made as its pictures are alone."""
        noise = torch.randn(latent.shape[1:], generator=torch.Generator().manual_seed(seed))
        return cls(latent.float(), noise.to(latent.device).expand(latent.shape), **fields)

    def noised(self, sigma: torch.Tensor, batch: int) -> torch.Tensor:
        """The latent at noise levels, as the model takes it: (B, C, h, w) fp32, variance preserving.

        sigma: (1,) or of rows that divide the batch, which are tiled over it as the latents are.
        """
        sigma = tile_rows(sigma.reshape(-1, 1, 1, 1).to(self.latent), batch)
        noisy = (tile_rows(self.latent, batch) + sigma * tile_rows(self.noise, batch)) / (1 + sigma.square()).sqrt()
        return noisy.expand(batch, -1, -1, -1)

    def to(self, device) -> "Reference":
        """The same on a device."""
        return replace(self, latent=self.latent.to(device), noise=self.noise.to(device))


def sigma_at(timestep: torch.Tensor) -> torch.Tensor:
    """The noise level of timesteps between 0 and 999, whole or not: (B,) float64, logarithmic in between."""
    kept = alphas_cumprod()
    levels = ((1 - kept) / kept).log() / 2
    time = timestep.double().cpu().clamp(0, TRAIN_STEPS - 1)
    low = time.floor().long().clamp(max=TRAIN_STEPS - 2)
    return torch.lerp(levels[low], levels[low + 1], time - low).exp()


class ReferencedModel:
    """A PixArt with a reference, called like the model alone: `sampling` takes it in its place."""

    def __init__(self, model: PixArt, reference: Reference):
        self.model, self.reference, self.config = model, reference, model.config
        self.project_caption = model.project_caption

    def __call__(self, latent, timestep, caption, caption_mask=None):
        """See PixArt.forward."""
        reference, time = self.reference, float(timestep.flatten()[0])
        last = TRAIN_STEPS - 1
        if not reference.strength or not (1 - reference.end) * last <= time <= (1 - reference.start) * last:
            return self.model(latent, timestep, caption, caption_mask)
        recorder = Recorder()
        noisy = reference.noised(sigma_at(timestep), len(latent)).to(latent)
        run_placed(self.model, noisy, timestep, caption, caption_mask, recorder.place, is_last=False)
        reader = Reader(recorder.keys, reference.strength)
        return run_placed(self.model, latent, timestep, caption, caption_mask, reader.place)


def run_placed(
    model: PixArt,
    latent,
    timestep,
    caption,
    caption_mask,
    place: Callable[[BlockInputs, int], BlockInputs],
    is_last: bool = True,
):
    """PixArt.forward with something in place of the self-attentions. is_last: False leaves the prediction out."""
    x, grid = model.embed_latent(latent)
    condition = model.embed_condition(latent, timestep)
    inputs = model.prepare_blocks(x, grid, condition, caption, caption_mask, model.attention)
    for index, block in enumerate(model.blocks):
        x = place(inputs, index).run_block(block, x, index)
    return model.project(x, condition, grid, latent.shape) if is_last else None
