"""What the host's nodes put around attention and blocks, sorted out in front of the blocks of an evaluation.

The host made these places for U-Nets: "attn1" is self-attention, "attn2" cross-attention, and functions of both see
tokens, (B, N, D). What belongs to other places of a U-Net has none here, and is refused by name.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ....pixart.quoting import list_names, shorten

ATTENTIONS = ("attn1", "attn2")
# Where only a U-Net has a place for a patch.
UNET_PATCHES = (
    "input_block_patch",
    "input_block_patch_after_skip",
    "middle_patch",
    "middle_block_after_patch",
    "output_block_patch",
    "emb_patch",
    "forward_timestep_embed_patch",
)
BLOCK, MIDDLE = "double_block", "middle"  # names of places in patches_replace: a DiT's, and the U-Net's that maps
Replacement = Callable[..., Any]


@dataclass(frozen=True)
class BlockPatches:
    """All patches of one evaluation.

    options: the host's transformer options. depth: how many blocks there are. ratio: of trained key compression.
    grid: (rows, columns) of tokens.
    """

    options: dict
    depth: int
    ratio: int
    grid: tuple[int, int]
    around: dict[str, list[Callable]]

    def replacement(self, kind: str, index: int) -> Replacement | None:
        """What replaces block `index` ("dit"), or its self-attention ("attn1") or cross-attention ("attn2").

        A U-Net's middle block is here the block at depth // 2.
        """
        replaced = self.options.get("patches_replace", {}).get(kind, {})
        places = [(BLOCK, index)]
        if kind in ATTENTIONS and index == self.depth // 2:
            places += [(MIDDLE, 0, 0), (MIDDLE, 0)]
        return next((replaced[place] for place in places if place in replaced), None)

    def place(self, inputs, index: int):
        """The BlockInputs of block `index` with what is patched around its attentions."""
        changes = {}
        for kind, field in zip(ATTENTIONS, ("self_attention", "cross_attention"), strict=True):
            replacement = self.replacement(kind, index)
            if replacement is not None:
                changes[field] = functools.partial(self._replaced, replacement, index)
        if "self_attention" in changes:
            changes["window"] = 1  # a replacement may count on as many values as there are tokens
        if self.around:
            changes["around"] = AroundAttention(self, index)
        # A patch may decide in every evaluation, which a compiled block would not.
        return inputs._replace(**changes, run=None) if changes else inputs

    def describe(self, index: int, num_heads: int, width: int) -> dict:
        """Where a patch is, as it is given to it: the host's `extra_options`."""
        extra = {name: value for name, value in self.options.items() if name not in ("patches", "patches_replace")}
        # The size in tokens, as in a U-Net's first blocks: by it patches find the rows and columns again.
        shape = [None, width, *self.grid]
        place = {"block": (BLOCK, index), "block_index": index, "transformer_index": index, "original_shape": shape}
        return {**extra, **place, "n_heads": num_heads, "dim_head": width // num_heads, "attn_precision": None}

    def _replaced(self, replacement, index, q, k, v, num_heads, mask=None):
        """An attention that a patch put in place of the model's, called as `pixart.layers.attend` is."""
        extra = self.describe(index, num_heads, q.shape[2])
        out = replacement(q, k, v, extra if mask is None else {**extra, "attn_mask": mask})
        return spread_windows(out, self.grid, self.ratio) if out.shape[1] < q.shape[1] else out


@dataclass(frozen=True)
class AroundAttention:
    """Patches in front of the attentions of one block and behind them, see `pixart.transformer.BlockInputs`."""

    patches: BlockPatches
    index: int

    def self_attention(self, attention, x, inputs):
        """Runs the module `attention` on x, (B, N, D)."""
        extra = self.patches.describe(self.index, attention.num_heads, x.shape[2])
        query, context, values = self._before("attn1_patch", x, x, x, extra)
        if len(query) != len(context):
            raise ValueError(
                f"Attention in tiles: got a patch that makes {len(query)} rows of {len(context)}, expected as many as "
                f"before. Remove HyperTile or its like, which is for U-Nets; PixArt KV Compression saves time here."
            )
        out = attention(query, inputs.grid, inputs.self_attention, context, values, inputs.window)
        return self._behind("attn1_output_patch", out, extra)

    def cross_attention(self, attention, x, keys_values, inputs):
        """Runs the module `attention` on x, (B, N, D). keys_values: of the caption, (B, L, 2 D)."""
        extra = self.patches.describe(self.index, attention.num_heads, x.shape[2])
        query, context, values = self._before("attn2_patch", x, inputs.caption, inputs.caption, extra)
        bias = inputs.caption_bias
        if context is not inputs.caption or values is not inputs.caption:
            keys = attention.keys_values(context).chunk(2, dim=2)[0]
            keys_values = torch.cat([keys, attention.keys_values(values).chunk(2, dim=2)[1]], dim=2)
            bias = None if bias is None else show_more(bias, keys.shape[1])
        return self._behind("attn2_output_patch", attention(query, keys_values, bias, inputs.cross_attention), extra)

    def _before(self, name, query, context, values, extra):
        for patch in self.patches.around.get(name, ()):
            found = patch(query, context, values, extra)
            if isinstance(found, Mapping):  # as patches of joint attention answer
                found = [found.get(key, given) for key, given in zip("qkv", (query, context, values), strict=True)]
            query, context, values = found
        return query, context, values

    def _behind(self, name, out, extra):
        for patch in self.patches.around.get(name, ()):
            out = patch(out, extra)
        return out


def read_patches(options: dict, depth: int, ratio: int, grid: tuple[int, int]) -> BlockPatches | None:
    """The patches in the host's transformer options, None where blocks run as they are.

    Raises ValueError for those that have no place in PixArt.
    """
    patches, replaced, rope = options.get("patches"), options.get("patches_replace"), options.get("rope_options")
    if rope:
        _refuse_rotation(rope)
    if not patches and not replaced:
        return None
    _refuse_unet_patches(patches or {})
    _refuse_unet_blocks(replaced or {}, depth)
    names = [f"{kind}{end}" for kind in ATTENTIONS for end in ("_patch", "_output_patch")]
    around = {name: patches[name] for name in names if (patches or {}).get(name)}
    return BlockPatches(options, depth, ratio, grid, around)


def _refuse_rotation(rope: Mapping) -> None:
    """Positions are added to PixArt's tokens, not turned into queries and keys."""
    moved = [name for name, value in rope.items() if value != (1.0 if name.startswith("scale") else 0.0)]
    if moved:
        raise ValueError(
            f"Rotary positions: got a change of {list_names(moved)}, expected none. PixArt has no rotary positions: "
            f"remove ScaleROPE."
        )


def _refuse_unet_patches(patches: Mapping) -> None:
    found = [name for name in UNET_PATCHES if patches.get(name)]
    if found:
        raise ValueError(
            f"A node for U-Nets: got a patch of {list_names(found)}, expected one of attention or of whole blocks. "
            f"PixArt is a transformer without such places: remove the node in front of the sampler that is for U-Nets."
        )


def _refuse_unet_blocks(replaced: Mapping, depth: int) -> None:
    for kind in (*ATTENTIONS, "dit"):
        for place in replaced.get(kind, ()):
            if place[0] == BLOCK and place[1] >= depth:
                raise ValueError(
                    f"No such block: got {shorten(place[1])}, expected 0 to {depth - 1}. This PixArt model has {depth} "
                    f"blocks: change the layers in the node that names them."
                )
            if kind in ATTENTIONS and place[0] != BLOCK and tuple(place[:2]) != (MIDDLE, 0):
                raise ValueError(
                    f"A node for U-Nets: got a patch of the block {shorten(place)}, expected ('{BLOCK}', 0) to "
                    f"('{BLOCK}', {depth - 1}). Remove the node in front of the sampler that is for U-Nets."
                )


def spread_windows(x, grid, ratio):
    """(B, M, D), a token for each window of ratio x ratio, back to the token grid: (B, rows * columns, D)."""
    rows, columns = (side // ratio for side in grid)
    x = x.transpose(1, 2).unflatten(2, (rows, columns))
    return F.interpolate(x, size=grid, mode="nearest").flatten(2).transpose(1, 2)


def show_more(bias, length):
    """A caption's bias (B, 1, 1, L) for more tokens, which are all shown: (B, 1, 1, length)."""
    return F.pad(bias, (0, length - bias.shape[3]))
