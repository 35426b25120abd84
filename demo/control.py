"""What the demo's ControlNet learns from: scenes with their edges, and captions that tell the colours alone."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ..pixart.data.examples import Example, identify_examples
from ..pixart.encoders.edges import soft_edges
from ..pixart.files.atomic import write_atomically
from .autoencoder import VAE_SCALE, average_latents
from .decoder_stage import to_tensor
from .pool import Bucket, bucket_scenes
from .scenes import Scene, describe, draw_scene
from .text import encode_text, make_text_batch

COUNTS = (32, 45, 23)  # weights of one, two and three shapes
SMALL_BUCKETS = (
    Bucket(64, 64, 5000, 0.6, COUNTS),
    Bucket(64, 96, 1000, 0.2, COUNTS),
    Bucket(96, 64, 1000, 0.2, COUNTS),
)
FULL_BUCKETS = (
    Bucket(128, 128, 6000, 0.6, COUNTS),
    Bucket(96, 160, 1500, 0.2, COUNTS),
    Bucket(160, 96, 1500, 0.2, COUNTS),
)
FULL_CAPTION_SHARE = 0.3  # so that a caption which tells the shapes as well is still understood
_CHUNK = 64


def colour_caption(scene: Scene, rng: Random | None = None) -> str:
    """The colours of a scene in words, and neither shapes nor places. rng: shuffles the items."""
    items = list(scene.items)
    if rng is not None:
        rng.shuffle(items)
    return f"{' and '.join(f'a {item.colour} shape' for item in items)} on a {scene.background} background"


def draw_hints(pictures: Tensor) -> Tensor:
    """The control pictures: (B, 3, H, W) in [0, 1] -> their edges, the same shape.

    Soft edges, since the autoencoder averages 8x8 pixels: of a line that is thin, the average tells that it is
    somewhere in the cell; of one that reaches into the neighbours, also where.
    """
    return soft_edges(pictures).expand(-1, 3, -1, -1)


def _encode_scenes(scenes: Sequence[Scene], bucket: Bucket, shrink: int) -> dict[str, Tensor]:
    """Latents and hints of scenes: (scenes, 4, h, w) float16 each, on the model's scale.

    shrink: hints are drawn so many times as large and then averaged, so that lines are as wide against the shapes as
    in pictures of that size.
    """
    parts: dict[str, list[Tensor]] = {"latent": [], "hint": []}
    for start in tqdm(
        range(0, len(scenes), _CHUNK), desc=f"{bucket.height_px}x{bucket.width_px}", leave=False, disable=None
    ):
        part = scenes[start : start + _CHUNK]
        pictures, large = (
            to_tensor([draw_scene(scene, bucket.height_px * scale, bucket.width_px * scale) for scene in part])
            for scale in (1, shrink)
        )
        parts["latent"].append(average_latents(pictures).half())
        parts["hint"].append(average_latents(F.avg_pool2d(draw_hints(large), shrink)).half())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


@torch.no_grad()
def _encode_captions(
    captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, encoder: T5EncoderModel
) -> list[Tensor]:
    """T5 states (L, D) of each caption."""
    states = []
    for start in range(0, len(captions), _CHUNK):
        batch = make_text_batch(list(captions[start : start + _CHUNK]), tokenizer)
        encoded = encode_text(encoder, batch)
        states += [row[kept].clone() for row, kept in zip(encoded, batch.kept, strict=True)]
    return states


class ControlFeatures:
    """A FeatureSet of scenes with their hints; what was drawn is kept under `folder`. shrink: see _encode_scenes."""

    null_caption = None  # the demo's denoiser has a learned one

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder: T5EncoderModel,
        folder: Path,
        *,
        buckets: Sequence[Bucket] = FULL_BUCKETS,
        shrink: int = 1,
        seed: int = 1,
    ):
        rng = Random(f"control captions {seed}")
        self.captions: list[str] = []
        self.sizes_px: list[tuple[int, int]] = []
        self.latents: list[Tensor] = []
        self.hints: list[Tensor] = []
        for bucket in buckets:
            scenes = bucket_scenes(bucket, seed)
            path = folder / f"{bucket.height_px}x{bucket.width_px}_{bucket.scenes}_{seed}.safetensors"
            if not path.exists():
                encoded = _encode_scenes(scenes, bucket, shrink)
                write_atomically(path, lambda temporary, encoded=encoded: save_file(encoded, temporary))
            content = load_file(path)
            self.latents += content["latent"].unbind()
            self.hints += content["hint"].unbind()
            self.sizes_px += [(bucket.height_px, bucket.width_px)] * len(scenes)
            self.captions += [
                describe(scene, rng) if rng.random() < FULL_CAPTION_SHARE else colour_caption(scene, rng)
                for scene in scenes
            ]
        self.states = _encode_captions(self.captions, tokenizer, encoder)
        self.bins = [tuple(latent.shape[-2:]) for latent in self.latents]
        self.is_prior = [False] * len(self.bins)

    @property
    def identity(self) -> str:
        return identify_examples(self)

    def name_of(self, index: int) -> str:
        return f"scene {index + 1}"

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Example:
        height_px, width_px = self.sizes_px[index]
        return Example(
            latent=self.latents[index].float() / VAE_SCALE,
            caption=self.states[index],
            size_px=(height_px, width_px),
            aspect_ratio=height_px / width_px,
            hint=self.hints[index].float() / VAE_SCALE,
            text=self.captions[index],
        )
