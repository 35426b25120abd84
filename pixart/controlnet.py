"""PixArt ControlNet: copies of a base model's first blocks that steer the next ones by an image."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from .config import PixArtConfig
from .layers import tile_rows
from .transformer import BlockInputs, PixArt, PixArtBlock

DEFAULT_COPIES = 13  # of 28 blocks: the "half" form, the only one released

Residual = Callable[[torch.Tensor, BlockInputs], torch.Tensor]


class ControlBlock(nn.Module):
    """A copy of one base block, and the projections that start at zero and so leave the base as it was."""

    def __init__(self, config: PixArtConfig, index: int, *, operations=nn, dtype=None, device=None):
        super().__init__()
        factory = {"operations": operations, "dtype": dtype, "device": device}
        width = config.hidden_size
        compress = config.kv_compress_ratio > 1 and index in config.kv_compress_layers
        self.copied_block = PixArtBlock(config, compress=compress, **factory)
        if index == 0:
            self.before_proj = operations.Linear(width, width, dtype=dtype, device=device)
        self.after_proj = operations.Linear(width, width, dtype=dtype, device=device)

    def forward(self, condition, tokens, inputs: BlockInputs, keys_values=None):
        """condition: (B, N, D) of the block before. tokens: (B, N, D) of the base; the first block alone reads them.

        keys_values: of the copy's cross-attention, (B, L, 2 D), if known.
        The first block's condition may have fewer rows, which are tiled over the batch.
        Returns the residual for the base, and the condition for the next block, both (B, N, D).
        """
        if hasattr(self, "before_proj"):
            condition = self.before_proj(condition)
            condition = tokens + (condition if len(condition) == 1 else tile_rows(condition, len(tokens)))
        condition = inputs.run_copy(self.copied_block, condition, keys_values)
        return self.after_proj(condition), condition


class PixArtControlNet(nn.Module):
    """The control branch of PixArt-delta over any PixArt: single- or multi-scale, alpha or Sigma.

    config: the base model's. num_copies: how many of its first blocks are copied, at most depth - 1 ("full").
    Copy i reads the output of copy i - 1; its projected output is added in front of base block i + 1.
    Parameter names are the original checkpoints' keys (`controlnet.0.copied_block...`); `load_state_dict` takes them
    without `controlnet.` as well. Call `reset_projections` or `from_base` for a branch that is to be trained.
    Raises ValueError when the base has too few blocks.
    Source: PixArt-delta, arXiv 2401.05252, section 4.
    """

    def __init__(
        self, config: PixArtConfig, num_copies: int = DEFAULT_COPIES, *, operations=nn, dtype=None, device=None
    ):
        super().__init__()
        if not 1 <= num_copies < config.depth:
            raise ValueError(
                f"Too many copied blocks: got {num_copies}, expected 1 to {config.depth - 1} over a base of "
                f"{config.depth} blocks. Choose a ControlNet and a PixArt model that belong together."
            )
        self.config = config
        factory = {"operations": operations, "dtype": dtype, "device": device}
        self.controlnet = nn.ModuleList(ControlBlock(config, index, **factory) for index in range(num_copies))
        self.register_load_state_dict_pre_hook(_accept_bare_keys)

    @classmethod
    def from_base(cls, base: PixArt, num_copies: int | None = None, **factory) -> "PixArtControlNet":
        """A branch that is ready to be trained: copies of the base's blocks between projections of zeros.

        num_copies: 13, or as many as a smaller base allows. Controlled by it, the base predicts exactly what it did.
        """
        if num_copies is None:
            num_copies = min(DEFAULT_COPIES, base.config.depth - 1)
        control = cls(base.config, num_copies, **factory)
        control.copy_base(base)
        return control

    @property
    def num_copies(self) -> int:
        """How many base blocks are copied."""
        return len(self.controlnet)

    def copy_base(self, base: PixArt) -> None:
        """Takes over the weights of the base's first blocks, and sets the projections to zero."""
        for block, original in zip(self.controlnet, base.blocks, strict=False):
            block.copied_block.load_state_dict(original.state_dict())
        self.reset_projections()

    def reset_projections(self) -> None:
        """Sets the projections to zero, so that the branch adds nothing yet."""
        for block in self.controlnet:
            for projection in (getattr(block, "before_proj", None), block.after_proj):
                if projection is not None:
                    nn.init.zeros_(projection.weight)
                    nn.init.zeros_(projection.bias)

    def forward(
        self,
        base: PixArt,
        latent,
        timestep,
        caption,
        condition,
        caption_mask=None,
        resolution=None,
        aspect_ratio=None,
    ):
        """The residuals for `base(..., control=residuals)`: a list of num_copies (B, N, hidden_size).

        condition: (B, C, H, W), the control image encoded and scaled like the latent; fewer rows are tiled over the
        batch.
        The rest: see PixArt.forward. This embeds the latent and runs the base's first block, which the base then
        does once more; `attach` spares that.
        """
        self.match_base(base.config)
        tokens, grid = base.embed_latent(latent)
        embedded = base.embed_condition(latent, timestep, resolution, aspect_ratio)
        inputs = base.prepare_blocks(tokens, grid, embedded, caption, caption_mask, base.attention)
        return self.residuals(base.blocks[0](tokens, inputs), self.embed(base, condition), inputs)

    def embed(self, base: PixArt, condition):
        """The control image's latent (B, C, H, W) as tokens (B, N, D), by the base's own embedding."""
        return base.embed_latent(condition)[0]

    def residuals(self, tokens, condition, inputs: BlockInputs) -> list[torch.Tensor]:
        """All residuals at once. tokens: (B, N, D) after the base's first block. condition: (B, N, D), see `embed`."""
        found = []
        for block in self.controlnet:
            residual, condition = block(condition, tokens, inputs)
            found.append(residual)
        return found

    def read_caption(self, caption) -> tuple[torch.Tensor, ...]:
        """What the cross-attention of every copy makes of a projected caption (B, L, D): (B, L, 2 D) each."""
        return tuple(block.copied_block.cross_attn.keys_values(caption) for block in self.controlnet)

    def attach(self, base: PixArt, condition) -> list[Residual]:
        """What `base(..., control=...)` takes to run this branch in step with the base, block by block.

        condition: (B, C, H, W), as in `forward`. Good for any number of passes, one after another. Nothing is computed
        twice, and no more than one residual is held.
        Raises ValueError for a base of another shape.
        """
        self.match_base(base.config)
        return ControlBranch(self, base, condition).residuals()

    def match_base(self, config: PixArtConfig) -> None:
        """Takes the number of heads, which no weight shows, from the base that is to be steered.

        Raises ValueError when a base of this configuration has blocks that these cannot be copies of.
        """
        if self.num_copies >= config.depth:
            raise ValueError(
                f"ControlNet too deep: got {self.num_copies} copied blocks over a base model of {config.depth}, "
                f"expected at most {config.depth - 1}. Connect the PixArt model that the ControlNet was trained on."
            )
        ours, theirs = _block_fields(self.config, self.num_copies), _block_fields(config, self.num_copies)
        for field, value in ours.items():
            if value != theirs[field]:
                raise ValueError(
                    f"ControlNet of another PixArt: got {field} {value}, expected {theirs[field]} as in the base "
                    f"model. Connect the PixArt model that the ControlNet was trained on."
                )
        for block in self.controlnet:
            block.copied_block.attn.num_heads = block.copied_block.cross_attn.num_heads = config.num_heads


class ControlBranch:
    """A control branch beside a pass of its base: each copy runs when the base gets to the block after it.

    captions: projected caption -> `PixArtControlNet.read_caption` of it, kept for as long as the base keeps its own;
    those who make a branch for every step give the same each time.
    """

    def __init__(
        self, control: PixArtControlNet, base: PixArt, condition, captions: WeakTensorKeyDictionary | None = None
    ):
        self.control, self.base, self.latent = control, base, condition
        self.captions = WeakTensorKeyDictionary() if captions is None else captions
        self.condition = None  # the last copy's output, (B, N, D)

    def residuals(self) -> list[Residual]:
        """A function for each copy, to be called in their order; the first starts over."""
        return [partial(self.advance, index) for index in range(self.control.num_copies)]

    def advance(self, index: int, tokens, inputs: BlockInputs):
        """Runs copy `index` and returns its residual, (B, N, D). tokens: (B, N, D) of the base."""
        condition = self.control.embed(self.base, self.latent.to(tokens)) if index == 0 else self.condition
        residual, condition = self.control.controlnet[index](
            condition, tokens, inputs, self._keys_values(index, inputs)
        )
        self.condition = condition if index + 1 < self.control.num_copies else None
        return residual

    def _keys_values(self, index: int, inputs: BlockInputs):
        """What copy `index` reads of the caption; None where the base keeps none either, or tiles what it keeps."""
        if inputs.keys_values is None or len(inputs.keys_values[0]) != len(inputs.caption):
            return None
        if inputs.caption not in self.captions:
            self.captions[inputs.caption] = self.control.read_caption(inputs.caption)
        return self.captions[inputs.caption][index]


def _block_fields(config: PixArtConfig, count: int) -> dict:
    """What the shapes of a model's first `count` blocks depend on."""
    fields = {name: getattr(config, name) for name in ("hidden_size", "mlp_ratio", "qk_norm")}
    layers = config.kv_compress_layers
    ratios = [config.kv_compress_ratio if index in layers else 1 for index in range(count)]
    return fields | {"kv_compress_ratio": ratios}


def _accept_bare_keys(control, state_dict, prefix, *_):
    """Before a load: `0.copied_block...` -> `controlnet.0.copied_block...`."""
    for key in [key for key in state_dict if key.startswith(prefix) and key[len(prefix) : len(prefix) + 1].isdigit()]:
        state_dict[f"{prefix}controlnet.{key[len(prefix) :]}"] = state_dict.pop(key)
