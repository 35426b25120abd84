"""Scenes and their latents for the denoiser: drawn and encoded once, in parts that are kept; captions come later."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..autoencoder import Autoencoder
from .crops import to_tensor
from .run import Stopped
from .scenes import Scene, draw_scene, random_scene

PART = 1000  # scenes in a file
BATCH = 50
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bucket:
    """Scenes of one picture size. parts: of PART scenes. share: of the batches. counts: weights of 1 to 4 icons."""

    height_px: int
    width_px: int
    parts: int
    share: float
    counts: tuple[int, int, int, int]


_EARLY, _LATE = (45, 30, 15, 10), (30, 32, 23, 15)
# The position grid spans the same range at any size, so small pictures teach layout at a fraction of the cost.
SMALL_BUCKETS = (
    Bucket(64, 64, 16, 0.5, _EARLY),
    Bucket(80, 80, 8, 0.3, _EARLY),
    Bucket(64, 96, 4, 0.1, _EARLY),
    Bucket(96, 64, 4, 0.1, _EARLY),
)
FULL_BUCKETS = (
    Bucket(128, 128, 28, 0.64, _LATE),
    Bucket(96, 160, 6, 0.12, _LATE),
    Bucket(160, 96, 6, 0.12, _LATE),
    Bucket(112, 144, 3, 0.06, _LATE),
    Bucket(144, 112, 3, 0.06, _LATE),
)


def part_scenes(bucket: Bucket, part: int, seed: int) -> list[Scene]:
    """The scenes of one part of a bucket; the same for the same seed."""
    rng = Random(f"pool {seed} {bucket.height_px}x{bucket.width_px} {part}")
    counts = rng.choices((1, 2, 3, 4), bucket.counts, k=PART)
    return [random_scene(rng, count, bucket.height_px, bucket.width_px) for count in counts]


def fingerprint(encoder: torch.nn.Module) -> str:
    """A name for an encoder's weights: latents of another encoder are never taken for its own."""
    digest = hashlib.sha256()
    for value in encoder.state_dict().values():
        digest.update(value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@torch.no_grad()
def encode(model: Autoencoder, scenes: list[Scene], height_px: int, width_px: int, device: torch.device) -> Tensor:
    """Draw and encode: (scenes, 4, h, w) float16 on the processor."""
    parts = []
    for start in range(0, len(scenes), BATCH):
        batch = to_tensor([draw_scene(scene, height_px, width_px) for scene in scenes[start : start + BATCH]])
        with torch.autocast(device.type, torch.bfloat16):
            parts.append(model.encode(batch.to(device, memory_format=torch.channels_last)).half().cpu())
    return torch.cat(parts).contiguous()


class Pool:
    """Buckets with their scenes and latents; latents are kept under `folder`, those of other encoders aside."""

    def __init__(
        self, buckets: tuple[Bucket, ...], folder: Path, model: Autoencoder, *, seed=0, device="cpu", stop=lambda: False
    ):
        self.buckets, self.scenes, self.latents = buckets, [], []
        folder = folder / fingerprint(model.taesd_encoder)
        folder.mkdir(parents=True, exist_ok=True)
        with tqdm(total=sum(bucket.parts for bucket in buckets), desc="pool", unit="part") as bar:
            for bucket in buckets:
                scenes, latents = [], []
                for part in range(bucket.parts):
                    if stop():
                        raise Stopped("Stopped while pictures were encoded. The same command goes on.")
                    drawn = part_scenes(bucket, part, seed)
                    path = folder / f"{bucket.height_px}x{bucket.width_px}_{part}_{seed}.safetensors"
                    if not path.exists():
                        encoded = encode(model, drawn, bucket.height_px, bucket.width_px, torch.device(device))
                        save_file({"latents": encoded}, path.with_suffix(".part"))
                        path.with_suffix(".part").replace(path)
                    scenes += drawn
                    latents.append(load_file(path)["latents"])
                    bar.update()
                self.scenes.append(scenes)
                self.latents.append(torch.cat(latents))

    def draw(self, rng: Random, batch_size: int) -> tuple[Bucket, list[Scene], Tensor]:
        """A batch out of one bucket: the bucket, its scenes, latents (B, 4, h, w) float32."""
        index = rng.choices(range(len(self.buckets)), [bucket.share for bucket in self.buckets])[0]
        chosen = [rng.randrange(len(self.scenes[index])) for _ in range(batch_size)]
        return self.buckets[index], [self.scenes[index][k] for k in chosen], self.latents[index][chosen].float()
