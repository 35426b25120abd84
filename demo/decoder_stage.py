"""Training the autoencoder's decoder: crops of scenes in, sharp crops out of their averaged latents."""

import math
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..pixart.training.optimizers import MovingAverage
from .autoencoder import Autoencoder, average_latents, set_averaging_encoder, set_enlarging_decoder
from .loop import Resumable, clip_gradients
from .scenes import OUTLINES, TRAINED_SHAPES, draw_scene, item_box, paint_shape, random_scene

CROP_PX = 48
LEARNING_RATE = 1.5e-3
NOISE = 0.15  # greatest deviation of the noise put on latents, for those that a denoiser leaves imperfect
FREE_SHARE = 0.2  # pictures with any colours and shapes, so that the decoder knows more than the captions' words


def _scene_crop(rng: Random) -> np.ndarray:
    """A crop around a point of some shape's outline, as the flat rest teaches little."""
    scene = random_scene(rng, rng.choice((1, 2, 3)))
    picture = draw_scene(scene)
    left, top, side = item_box(rng.choice(scene.items), *picture.shape[:2])
    angle = rng.uniform(0, 2 * math.pi)
    return _crop(picture, left + side / 2 * (1 + math.cos(angle)), top + side / 2 * (1 + math.sin(angle)))


def _free_crop(rng: Random) -> np.ndarray:
    """A crop of shapes of any kind and colour over a gradient."""
    corners = np.array([[rng.uniform(0, 255) for _ in range(3)] for _ in range(3)], np.float32)
    down, across = np.mgrid[0:1:96j, 0:1:96j].astype(np.float32)[..., None] * rng.choice((0, 0, 1))
    picture = corners[0] + down * (corners[1] - corners[0]) / 2 + across * (corners[2] - corners[0]) / 2
    for _ in range(rng.randint(1, 4)):
        side = rng.uniform(20, 60)
        box = (rng.uniform(-5, 90 - side), rng.uniform(-5, 90 - side), side)
        paint_shape(picture, rng.choice(list(OUTLINES)), box, [rng.uniform(0, 255) for _ in range(3)])
    return _crop(picture.clip(0, 255).astype(np.uint8), rng.uniform(20, 76), rng.uniform(20, 76))


def _crop(picture: np.ndarray, x: float, y: float) -> np.ndarray:
    height, width = picture.shape[:2]
    # Any pixel may be the corner: shapes lie anywhere against the grid of 8x8 cells.
    left = round(min(max(x - CROP_PX / 2, 0), width - CROP_PX))
    top = round(min(max(y - CROP_PX / 2, 0), height - CROP_PX))
    return picture[top : top + CROP_PX, left : left + CROP_PX]


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """List of (h, w, 3) uint8 to (B, 3, h, w) float in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


class DecoderStage(Resumable):
    """The decoder, its optimiser and its average."""

    def __init__(self, *, seed: int = 0, batch_size: int = 12, ema_decay: float = 0.995):
        torch.manual_seed(seed)
        self.seed, self.batch_size = seed, batch_size
        self.model = Autoencoder()
        set_averaging_encoder(self.model.taesd_encoder)
        set_enlarging_decoder(self.model.taesd_decoder)
        self.decoder = self.model.taesd_decoder.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            self.decoder.parameters(), LEARNING_RATE, (0.9, 0.98), weight_decay=0, foreach=True
        )
        self.ema = MovingAverage(dict(self.decoder.named_parameters()), ema_decay)

    def step(self, number: int, learning_rate_factor: float, progress: float) -> dict[str, float]:
        rng = Random(f"decoder {self.seed} {number}")
        crops = [_free_crop(rng) if rng.random() < FREE_SHARE else _scene_crop(rng) for _ in range(self.batch_size)]
        pictures = to_tensor(crops)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        latents = average_latents(pictures)
        deviation = torch.rand(len(latents), 1, 1, 1, generator=generator) * NOISE
        noisy = latents + deviation * torch.randn(latents.shape, generator=generator)
        output = self.decoder(noisy.to(memory_format=torch.channels_last))
        mse = F.mse_loss(output, pictures)
        loss = F.l1_loss(output, pictures) + 4 * mse
        self.optimizer.zero_grad()
        loss.backward()
        norm = clip_gradients(list(self.decoder.parameters()), 0.5)
        self.optimizer.param_groups[0]["lr"] = LEARNING_RATE * learning_rate_factor * min(1, (number + 1) / 40)
        self.optimizer.step()
        self.ema.update()
        return {"psnr_noisy_crops": -10 * math.log10(mse.item()), "loss": loss.item(), "gradient": norm}

    def averaged(self) -> Autoencoder:
        """A copy of the autoencoder with the averaged decoder, for evaluation."""
        model = Autoencoder().requires_grad_(False).eval()
        model.load_state_dict(self.model.state_dict())
        self.ema.copy_to(dict(model.taesd_decoder.named_parameters()))
        return model

    def export(self, path: Path) -> None:
        """Write the averaged weights as fp16 safetensors, as ComfyUI's VAELoader reads them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.half().contiguous() for key, value in self.averaged().state_dict().items()}, path)


def reconstruction_psnr(model: Autoencoder, count: int = 24) -> float:
    """Mean PSNR in dB over fresh training-like scenes at 128 px, without noise."""
    rng = Random("reconstruction")
    pictures = to_tensor([draw_scene(random_scene(rng, 1 + k % 3, shapes=TRAINED_SHAPES)) for k in range(count)])
    with torch.no_grad():
        restored = model.decode(model.encode(pictures))
    return float((-10 * torch.log10((restored - pictures).square().mean((1, 2, 3)))).mean())
