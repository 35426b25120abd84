"""Captions and sizes as conditions of the host, which joins them into batches."""

import copy
import weakref

import comfy.conds
import torch

from ....pixart.config import LATENT_DOWNSCALE
from ....pixart.layers import masked_length

RATIO_UNITS = 1_000_000  # aspect ratios travel as integers, since the host casts floats to the inference dtype


class CaptionCond(comfy.conds.CONDRegular):
    """A caption or its mask, (B, L, ...): joins others of any length by zeros at the end, which the mask hides.

    At every step of a run it gives the same tensors, by which PixArtModel knows the caption again.
    """

    def __init__(self, cond, whole):
        """whole: the caption has nothing to hide. That is asked before: to look is to wait for the device."""
        super().__init__(cond)
        self.whole = whole
        self._by_batch: dict[int, CaptionCond] = {}
        self._joined: tuple[list, torch.Tensor] | None = None  # (weak references to others, the rows of all)

    def process_cond(self, batch_size, **kwargs):
        """The same with its rows repeated up to the batch."""
        if batch_size not in self._by_batch:
            self._by_batch[batch_size] = super().process_cond(batch_size, **kwargs)
        return self._by_batch[batch_size]

    def can_concat(self, other):
        """True when only the lengths differ."""
        return self.cond.shape[2:] == other.cond.shape[2:] and self.cond.device == other.cond.device

    def concat(self, others):
        """Rows of all, padded to the longest: (sum of B, longest L, ...)."""
        known, joined = self._joined or ([], None)
        alike = len(known) == len(others) and all(ref() is other for ref, other in zip(known, others, strict=True))
        if joined is not None and alike:
            return joined
        captions = [self.cond, *(other.cond for other in others)]
        longest = max(caption.shape[1] for caption in captions)
        if not self.hide_nothing(others):
            longest = masked_length(longest, self.cond.device)
        captions = [pad_length(caption, longest) for caption in captions]
        joined = torch.cat(captions) if others else captions[0]
        self._joined = ([weakref.ref(other) for other in others], joined)
        return joined

    def hide_nothing(self, others):
        """Whether no caption has anything to hide, nor is lengthened for another."""
        length = self.cond.shape[1]
        return self.whole and all(getattr(each, "whole", False) and each.cond.shape[1] == length for each in others)

    def _copy_with(self, cond):
        twin = copy.copy(self)  # whose rows are the same ones, repeated
        twin.cond, twin._by_batch, twin._joined = cond, {}, None
        return twin


class MaskCond(CaptionCond):
    """A caption's mask, (B, L): joined to None where there is nothing to hide.

    Without a mask attention takes its fastest way.
    """

    def concat(self, others):
        """Rows of all, padded to the longest, (sum of B, longest L), or None."""
        return None if self.hide_nothing(others) else super().concat(others)


class SizeCond(comfy.conds.CONDRegular):
    """Whole numbers that say of what size the picture is, the same in every row: (B, n).

    Rows of the same numbers share their memory, so that nobody has to look whether they are alike.
    """

    def __init__(self, numbers, device, follows_latent=False):
        """follows_latent: the numbers are the latent's own, and change with it where a part of it is sampled alone."""
        super().__init__(torch.tensor([numbers], dtype=torch.long, device=device))
        self.numbers = tuple(numbers)
        self.follows_latent = follows_latent

    def _copy_with(self, cond):
        twin = copy.copy(self)
        twin.cond = cond
        return twin

    def process_cond(self, batch_size, **kwargs):
        """The same with so many rows."""
        return self._copy_with(self.cond[:1].expand(batch_size, -1))

    def concat(self, others):
        """Rows of all: (sum of B, n)."""
        if any(other.numbers != self.numbers for other in others):
            return super().concat(others)
        return self.cond[:1].expand(sum(len(each.cond) for each in (self, *others)), -1)


def pad_length(caption, length):
    """(B, L, ...) -> (B, length, ...), zeros at the end."""
    missing = length - caption.shape[1]
    if not missing:
        return caption
    return torch.cat([caption, caption.new_zeros(caption.shape[0], missing, *caption.shape[2:])], dim=1)


def in_window(name, cond, window, latent):
    """What stands for a condition while a window of the latent's rows or columns is sampled as a picture of its own.

    window: the host's; its dim is 2 for rows, 3 for columns. latent: the whole, (B, C, H, W).
    None leaves the condition to the host: one that is none of ours, or windows of the batch.
    """
    if window.dim < 2 or name not in ("c_crossattn", "attention_mask", "c_size", "c_ar"):
        return None
    if not getattr(cond, "follows_latent", False):
        return cond
    sides = list(latent.shape[2:])
    sides[window.dim - 2] = len(window.index_list) + (getattr(window, "causal_anchor_index", None) is not None)
    height, width = (side * LATENT_DOWNSCALE for side in sides)
    numbers = (height, width) if name == "c_size" else [round(height / width * RATIO_UNITS)]
    return SizeCond(numbers, cond.cond.device, True)
