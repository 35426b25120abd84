"""Scenes and their latents for the denoiser: drawn once, cached, captions drawn again with every use."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..pixart.weights.pickles import check_pth
from .autoencoder import average_latents
from .scenes import TRAINED_SHAPES, Scene, draw_scene, random_scene

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bucket:
    """Scenes of one picture size. share: of the batches. counts: weights of one, two and three shapes.

    shapes: names to choose from; what stands there twice is drawn twice as often.
    """

    height_px: int
    width_px: int
    scenes: int
    share: float
    counts: tuple[int, int, int]
    shapes: tuple[str, ...] = TRAINED_SHAPES


_EARLY, _LATE = (50, 35, 15), (32, 45, 23)
# The position grid spans the same range at any size, so small pictures teach layout at a fraction of the cost.
SMALL_BUCKETS = (
    Bucket(64, 64, 14000, 0.45, _EARLY),
    Bucket(80, 80, 8000, 0.25, _EARLY),
    Bucket(64, 96, 5000, 0.15, _EARLY),
    Bucket(96, 64, 5000, 0.15, _EARLY),
)
FULL_BUCKETS = (
    Bucket(128, 128, 20000, 0.64, _LATE),
    Bucket(96, 160, 5000, 0.12, _LATE),
    Bucket(160, 96, 5000, 0.12, _LATE),
    Bucket(112, 144, 2000, 0.04, _LATE),
    Bucket(144, 112, 2000, 0.04, _LATE),
    Bucket(104, 152, 1000, 0.02, _LATE),
    Bucket(152, 104, 1000, 0.02, _LATE),
)
# For a model that knows its way about: new scenes, and more of what it gets wrong most, single shapes and crosses.
LATER_BUCKETS = tuple(
    replace(
        bucket, scenes=bucket.scenes + 1000, counts=(42, 36, 22), shapes=(*TRAINED_SHAPES, "square", "cross", "cross")
    )
    for bucket in FULL_BUCKETS
)


def bucket_scenes(bucket: Bucket, seed: int) -> list[Scene]:
    """The bucket's scenes; the same for the same seed."""
    rng = Random(f"bucket {seed} {bucket.height_px}x{bucket.width_px}")
    counts = rng.choices((1, 2, 3), bucket.counts, k=bucket.scenes)
    size = bucket.height_px, bucket.width_px
    return [random_scene(rng, count, *size, shapes=bucket.shapes) for count in counts]


def _latents(bucket: Bucket, scenes: list[Scene], label: str) -> Tensor:
    """Draw and encode: (scenes, 4, h, w) float16."""
    parts = []
    for start in tqdm(range(0, len(scenes), 256), desc=label, leave=False):
        pictures = [draw_scene(scene, bucket.height_px, bucket.width_px) for scene in scenes[start : start + 256]]
        batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        parts.append(average_latents(batch).half())
    return torch.cat(parts)


class Pool:
    """Buckets with their scenes and latents; latents are cached under `folder`."""

    def __init__(self, buckets: tuple[Bucket, ...], folder: Path, seed: int = 0):
        self.buckets = buckets
        self.scenes, self.latents = [], []
        folder.mkdir(parents=True, exist_ok=True)
        for bucket in buckets:
            scenes = bucket_scenes(bucket, seed)
            label = f"{bucket.height_px}x{bucket.width_px}_{bucket.scenes}_{seed}"
            path = folder / f"{label}.pt"
            if not path.exists():
                torch.save(_latents(bucket, scenes, label), path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
            self.scenes.append(scenes)
            check_pth(path)
            self.latents.append(torch.load(path, weights_only=True))

    def draw(self, rng: Random, batch_size: int) -> tuple[Bucket, list[Scene], Tensor]:
        """A batch out of one bucket: the bucket, its scenes, latents (B, 4, h, w) float32."""
        index = rng.choices(range(len(self.buckets)), [bucket.share for bucket in self.buckets])[0]
        chosen = [rng.randrange(len(self.scenes[index])) for _ in range(batch_size)]
        return self.buckets[index], [self.scenes[index][k] for k in chosen], self.latents[index][chosen].float()
