"""What a trainer is fed: one encoded picture, a batch of them, and the set they come from."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Protocol

import torch

from ..quoting import list_names, shorten
from ..text import batch_captions
from .identity import digest, fingerprint


@dataclass(frozen=True)
class Example:
    """One picture with its caption, encoded.

    latent: (4, h, w) float, the mean of the autoencoder's posterior, NOT multiplied by the latent scale.
    deviation: (4, h, w) its standard deviation for sampling mean + deviation * noise as the original does, or None.
    caption: (L, D) T5 states, cut to the caption's true length.
    size_px: (height, width) for the size condition; aspect_ratio: height / width for the ratio condition.
    hint: (4, h, w) latent of the control picture, not scaled either, or None.
    noise: (4, h, w) of unit variance, which a teacher made the latent of (see data.pairs), or None.
    is_prior: a picture of the class that DreamBooth is to keep. text: the caption as it was encoded.
    mask: (1, h, w) float from 0 to 1, what of the picture is to be learned; None is all of it.
    weight: of its loss, a factor.
    """

    latent: torch.Tensor
    caption: torch.Tensor
    size_px: tuple[int, int]
    aspect_ratio: float
    deviation: torch.Tensor | None = None
    hint: torch.Tensor | None = None
    is_prior: bool = False
    text: str = ""
    noise: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Examples of one latent size, stacked; tensors are as Example describes them, with B in front.

    caption: (B, L, D), padded with zeros to the longest. caption_mask: (B, L) bool, True = keep.
    resolution: (B, 2) float32, (height, width) in pixels. aspect_ratio: (B, 1) float32. is_prior: (B,) bool.
    weight: (B,) float32, None where all are 1.
    """

    latent: torch.Tensor
    caption: torch.Tensor
    caption_mask: torch.Tensor
    resolution: torch.Tensor
    aspect_ratio: torch.Tensor
    is_prior: torch.Tensor
    deviation: torch.Tensor | None = None
    hint: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    weight: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.latent.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Batch":
        """The same on a device; dtype is for latents and captions alone, since sizes would be rounded by it."""
        moved = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                cast = dtype if field.name in ("latent", "deviation", "caption", "hint", "noise") else None
                moved[field.name] = tensor.to(device=device, dtype=cast)
        return replace(self, **moved)


def collate(examples: Sequence[Example]) -> Batch:
    """Stack examples of one latent size and caption width.

    Deviations and hints are stacked where all have one. Raises ValueError for no examples, for sizes that differ, and
    for hints that only some have.
    """
    if not examples:
        raise ValueError("Empty batch: got no pictures, expected at least one. Connect a dataset with pictures.")
    _check_equal("latent sizes", {tuple(example.latent.shape) for example in examples})
    _check_equal("caption widths", {example.caption.shape[-1] for example in examples})
    hints = [example.hint for example in examples if example.hint is not None]
    if hints and len(hints) < len(examples):
        raise ValueError(
            f"Control pictures are missing: got {len(hints)} for {len(examples)} pictures, expected one for each. "
            f"Add those that are missing to the dataset, or encode it with a control method."
        )
    deviations, noises = [example.deviation for example in examples], [example.noise for example in examples]
    caption, mask = batch_captions([example.caption[None] for example in examples])
    return Batch(
        latent=torch.stack([example.latent for example in examples]),
        deviation=None if any(each is None for each in deviations) else torch.stack(deviations),
        caption=caption,
        caption_mask=mask,
        resolution=torch.tensor([example.size_px for example in examples], dtype=torch.float32),
        aspect_ratio=torch.tensor([[example.aspect_ratio] for example in examples], dtype=torch.float32),
        hint=torch.stack(hints) if hints else None,
        noise=None if any(each is None for each in noises) else torch.stack(noises),
        is_prior=torch.tensor([example.is_prior for example in examples]),
        mask=_stack_masks(examples),
        weight=_stack_weights(examples),
    )


def _stack_masks(examples: Sequence[Example]) -> torch.Tensor | None:
    """(B, 1, h, w), of ones for pictures without a mask; None where no picture has one."""
    if all(example.mask is None for example in examples):
        return None
    ones = torch.ones(1, *examples[0].latent.shape[-2:])
    return torch.stack([ones if example.mask is None else example.mask.float() for example in examples])


def _stack_weights(examples: Sequence[Example]) -> torch.Tensor | None:
    if all(example.weight == 1 for example in examples):
        return None
    return torch.tensor([example.weight for example in examples], dtype=torch.float32)


def _check_equal(what: str, found: set) -> None:
    if len(found) > 1:
        listed = " and ".join(map(str, sorted(found)))
        raise ValueError(
            f"Different {what} in one batch: got {listed}, expected one. Take the batches from a BucketSampler over "
            f"the bins of one encoded dataset."
        )


def check_finite(example: Example, name: str) -> Example:
    """The example. Raises ValueError naming the picture when one of its tensors holds NaN or infinity."""
    for part in ("latent", "deviation", "caption", "hint", "noise", "mask"):
        tensor = getattr(example, part)
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(
                f"Damaged features: got NaN or infinity in the {part} of {shorten(name)} ({shorten(example.text)}), "
                f"expected numbers. Encode it again in fp32 or bf16, or take it out of the dataset."
            )
    return example


class FeatureSet(Protocol):
    """Encoded pictures by number.

    bins: (h_latent, w_latent) of each, without reading it. is_prior: of each, see Example. null_caption: (L, D) T5
    states of the empty caption, which stands in for dropped captions where a model has no learned one; None when
    nobody encoded it. identity: a hash of pictures and captions in their order, for a training to know them again.
    name_of: what messages call a picture.
    Some have more: blocks and fetch_ahead (see streams.reading), repeats: how often each is shown in an epoch, and
    draw(index, rng): the picture in one of its variants, where features[index] is always the first.
    """

    bins: list[tuple[int, int]]
    is_prior: list[bool]
    null_caption: torch.Tensor | None

    @property
    def identity(self) -> str: ...

    def name_of(self, index: int) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def draw_example(features: "FeatureSet", index: int, rng: Random) -> Example:
    """A picture of a FeatureSet, in one of its variants where it has some."""
    draw = getattr(features, "draw", None)
    return features[index] if draw is None else draw(index, rng)


def variants_of(features: "FeatureSet", index: int) -> tuple[list[Example], list[Example]]:
    """(one example for each caption of a picture, one for each of its views); of plain ones the same twice."""
    found = getattr(features, "variants_of", None)
    return ([features[index]],) * 2 if found is None else found(index)


def check_plain(features: "FeatureSet", what: str) -> None:
    """Raises ValueError for features with variants, masks, repeats or weights, which a form of files cannot hold."""
    varying = getattr(features, "varying", ())
    if varying:
        raise ValueError(
            f"{what} cannot hold this dataset: got pictures with {list_names(varying)}, expected plain ones. Encode "
            f"them without variants, masks, repeats and weights, or train from the cache."
        )


def identify_examples(features: "FeatureSet") -> str:
    """The identity of pictures that are in memory: a hash of sizes, marks and spread numbers of the tensors."""
    parts = []
    for example in map(features.__getitem__, range(len(features))):
        names = ("latent", "deviation", "caption", "hint", "noise", "mask")
        tensors = ((name, getattr(example, name)) for name in names)
        size = f"{tuple(example.size_px)} {example.aspect_ratio} {example.is_prior}"
        size += "" if example.weight == 1 else f" {example.weight}"
        parts += [fingerprint((name, tensor) for name, tensor in tensors if tensor is not None), size]
    return digest(*parts)


class ListFeatures:
    """A FeatureSet of examples in memory."""

    def __init__(self, examples: Sequence[Example], null_caption: torch.Tensor | None = None):
        self.examples = list(examples)
        self.bins = [tuple(example.latent.shape[-2:]) for example in self.examples]
        self.is_prior = [example.is_prior for example in self.examples]
        self.null_caption = null_caption

    @property
    def identity(self) -> str:
        return identify_examples(self)

    def name_of(self, index: int) -> str:
        return f"picture {index + 1}"

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]
