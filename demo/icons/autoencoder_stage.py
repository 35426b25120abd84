"""Training the demo's autoencoder: first both halves, then the decoder alone while the latents stay as they are."""

import math
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ...pixart.training.optimizers import MovingAverage
from ..autoencoder import Autoencoder, Encoder, average_latents, set_averaging_encoder, set_enlarging_decoder
from ..loop import Resumable, clip_gradients
from .crops import Crops, to_tensor
from .scenes import MOST_ITEMS, draw_scene, random_scene

LEARNING_RATE = 1e-3
NOISE = 0.12  # greatest deviation of the noise put on latents, for those that a denoiser leaves imperfect
RIM_WEIGHT = 1.0
# Latents stay near the averages, which are smooth, and their means and deviations over scenes near zero and one.
DRIFT_WEIGHT, SPREAD_WEIGHT = 0.003, 0.02
# Mean and deviation over scenes of what `average_latents` gives.
AVERAGES_MEAN = torch.tensor([0.40, -0.34, 0.24, -0.19])[:, None, None]
AVERAGES_STD = torch.tensor([1.02, 0.77, 0.57, 0.74])[:, None, None]


@torch.no_grad()
def start_encoder(encoder: Encoder) -> None:
    """Averages over 8x8 pixels as in `autoencoder`, with all that the averages leave unused free to learn."""
    random = [parameter.clone() for parameter in encoder.parameters()]
    set_averaging_encoder(encoder)
    for parameter, noise in zip(encoder.parameters(), random, strict=True):
        parameter += noise * (0.3 if parameter.dim() == 4 else 0)
    encoder[-1].weight[:, 4:] *= 0.3


def rims(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels: (B, 3, h - 1, w), (B, 3, h, w - 1)."""
    return pictures[:, :, 1:] - pictures[:, :, :-1], pictures[..., 1:] - pictures[..., :-1]


class AutoencoderStage(Resumable):
    """The autoencoder, its optimiser and its average. encoder: whether it is trained too."""

    def __init__(self, *, seed: int = 0, batch_size: int = 16, encoder: bool = True, device: str = "cpu"):
        torch.manual_seed(seed)
        self.seed, self.train_encoder, self.device = seed, encoder, torch.device(device)
        self.crops = Crops(seed if encoder else seed + 1, batch_size)
        self.model = Autoencoder()
        start_encoder(self.model.taesd_encoder)
        set_enlarging_decoder(self.model.taesd_decoder)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.model.taesd_encoder.requires_grad_(encoder)
        halves = [self.model.taesd_encoder, self.model.taesd_decoder] if encoder else [self.model.taesd_decoder]
        self.parameters = [parameter for half in halves for parameter in half.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, LEARNING_RATE, (0.9, 0.98), weight_decay=0, foreach=True)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad and "taesd" in name}
        self.ema = MovingAverage(trained, 0.998)

    def batches(self) -> Crops:
        """What `step` takes, by the step's number."""
        return self.crops

    def _losses(self, number: int, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of the reconstruction and of the latents, mean squared error."""
        generator = torch.Generator().manual_seed(number * 7919 + self.seed)
        with torch.autocast(self.device.type, torch.bfloat16):
            latents = self.model.taesd_encoder(pictures.to(memory_format=torch.channels_last)).float()
            deviation = (torch.rand(len(latents), 1, 1, 1, generator=generator) * 2 - 1).clamp(min=0) * NOISE
            noise = (deviation * torch.randn(latents.shape, generator=generator)).to(self.device)
            output = self.model.taesd_decoder((latents + noise).to(memory_format=torch.channels_last)).float()
        mse = F.mse_loss(output, pictures)
        rim = sum(F.l1_loss(a, b) for a, b in zip(rims(output), rims(pictures), strict=True))
        loss = F.l1_loss(output, pictures) + 4 * mse + RIM_WEIGHT * rim
        averages = (average_latents(pictures.cpu()) - AVERAGES_MEAN) / AVERAGES_STD
        mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        spread = (mean.square() + (deviation - 1).square()).mean()
        kept = DRIFT_WEIGHT * F.mse_loss(latents, averages.to(self.device)) + SPREAD_WEIGHT * spread
        return loss, kept, mse

    def step(self, number: int, learning_rate_factor: float, progress: float, batch: Tensor) -> dict:
        pictures = batch.to(self.device, non_blocking=True)
        loss, kept, mse = self._losses(number, pictures)
        self.optimizer.zero_grad()
        (loss + kept if self.train_encoder else loss).backward()
        norm = clip_gradients(self.parameters, 0.5)
        self.optimizer.param_groups[0]["lr"] = LEARNING_RATE * learning_rate_factor * min(1, (number + 1) / 100)
        self.optimizer.step()
        self.ema.update()
        psnr = -10 * math.log10(mse.item())
        return {"psnr_noisy_crops": psnr, "loss": loss.item(), "latents": kept.item(), "gradient": norm}

    def averaged(self) -> Autoencoder:
        """A copy with the averaged weights, for evaluation and export."""
        model = Autoencoder().to(self.device).requires_grad_(False).eval()
        model.load_state_dict(self.model.state_dict())
        self.ema.copy_to(dict(model.named_parameters()))
        return model.to(memory_format=torch.channels_last)

    def measure(self) -> dict[str, float]:
        """PSNR of held-out scenes."""
        return {"psnr_db": reconstruction_psnr(self.averaged(), device=self.device)}

    def export(self, path: Path) -> None:
        """Write the averaged weights as fp16 safetensors, as ComfyUI's VAELoader reads them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = self.averaged().cpu().state_dict()
        save_file({key: value.half().contiguous() for key, value in state.items()}, path)

    def continue_from(self, state: dict) -> None:
        """Begin with the averaged weights of another stage's state."""
        self.model.load_state_dict(state["model"])
        other = AutoencoderStage(encoder=True)
        other.load_state_dict(state)
        self.model.load_state_dict(other.averaged().state_dict())


def held_out_scenes(count: int, seed: str = "reconstruction") -> list:
    """Scenes at 128 px of triples that no training draws."""
    rng = Random(seed)
    return [random_scene(rng, 1 + k % MOST_ITEMS, held_out=True) for k in range(count)]


def reconstruct(model: Autoencoder, pictures: list[np.ndarray], device="cpu") -> np.ndarray:
    """(B, h, w, 3) uint8, through the autoencoder in bfloat16 and back."""
    with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
        batch = to_tensor(pictures).to(device, memory_format=torch.channels_last)
        restored = model.decode(model.encode(batch)).float()
    return (restored * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def reconstruction_psnr(model: Autoencoder, count: int = 24, device="cpu") -> float:
    """Mean PSNR in dB over held-out scenes at 128 px, without noise."""
    pictures = [draw_scene(scene) for scene in held_out_scenes(count)]
    restored = reconstruct(model, pictures, device)
    errors = [(a.astype(float) - b).__pow__(2).mean() / 255**2 for a, b in zip(restored, pictures, strict=True)]
    return float(np.mean([-10 * math.log10(max(error, 1e-9)) for error in errors]))
