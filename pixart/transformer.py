"""The PixArt diffusion transformer: alpha and Sigma, every trained size, any picture size."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .config import LATENT_DOWNSCALE, PixArtConfig
from .layers import (
    Attention,
    CaptionEmbedder,
    CrossAttention,
    Mlp,
    PatchEmbed,
    ScalarEmbedder,
    SelfAttention,
    attend,
    blank_hidden,
    common_row,
    lengthen,
    make_table,
    modulate,
    position_grid,
    read_table,
    tile_rows,
)

RECOMPUTED_KEYS = ("pos_embed",)  # in original files; depends on the picture's size, so never loaded
OPTIONAL_KEYS = ("y_embedder.y_embedding",)  # absent from diffusers files; see PixArt.has_null_caption
POSITION_CACHE_SIZE = 8  # pictures' sizes
POSITION_CACHE_BYTES = 64 * 2**20  # a 2K picture's positions take 36 MiB in half precision
MASK_ALIGNMENT = 8  # see `caption_bias`


class ProjectedCaption(NamedTuple):
    """A caption as the blocks read it, see `PixArt.project_caption`.

    states: (B, L, D). keys_values: for every block (B, L, 2 D), or None where each forward pass computes them.
    tables: `PixArt.stack_tables`, which is right for as long.
    """

    states: torch.Tensor
    keys_values: tuple[torch.Tensor, ...] | None
    tables: torch.Tensor | None = None

    def first(self, count):
        """The first `count` captions."""
        keys = self.keys_values
        return self._replace(
            states=self.states[:count], keys_values=None if keys is None else tuple(each[:count] for each in keys)
        )


class BlockInputs(NamedTuple):
    """What every block of one forward pass shares.

    modulation: (B, 6, D), or (1, 6, D) when all rows are alike. caption: (B, L, D), projected.
    caption_bias: (B, 1, 1, L) additive, or None. grid: (rows, columns) of tokens.
    self_attention, cross_attention: see `layers.attend`. keys_values: of `caption`, see ProjectedCaption.
    rows: for every block its `modulation_rows`, or None where each computes them.
    window: self-attention reads the means of window x window tokens. run: what runs a block in place
    of itself, see `run_block`.
    overwrites: blocks may write into the tokens that they are given, which nobody else holds, where no gradient is
    needed: a tensor less at the peak, of four or five times the tokens.
    around: what a host does in front of the attentions and behind them, or None: an object that runs the modules, with
    self_attention(module, x, inputs) and cross_attention(module, x, keys_values, inputs).
    """

    modulation: torch.Tensor
    caption: torch.Tensor
    caption_bias: torch.Tensor | None
    grid: tuple[int, int]
    self_attention: Attention
    cross_attention: Attention
    keys_values: tuple[torch.Tensor, ...] | None = None
    rows: tuple[torch.Tensor, ...] | None = None
    window: int = 1
    overwrites: bool = False
    run: Callable[..., torch.Tensor] | None = None
    around: Any = None

    def with_caption(self, caption):
        """The same with another projected caption, (B, L, D)."""
        return self if caption is self.caption else self._replace(caption=caption, keys_values=None)

    def keys_values_of(self, index):
        """What block `index` reads of the caption, (B, L, 2 D), or None where it has to compute that."""
        return None if self.keys_values is None else tile_rows(self.keys_values[index], self.caption.shape[0])

    def run_block(self, block, x, index):
        """Block `index` of the model, by `run` where there is one. x: (B, N, D). Returns (B, N, D)."""
        rows = None if self.rows is None else self.rows[index]
        return self._run(block, x, self.keys_values_of(index), rows)

    def run_copy(self, block, x, keys_values=None):
        """Any block of this width, by `run` where there is one. x: (B, N, D), kept as it is. Returns (B, N, D)."""
        return (self._replace(overwrites=False) if self.overwrites else self)._run(block, x, keys_values)

    def _run(self, block, x, keys_values=None, rows=None):
        return block(x, self, keys_values, rows) if self.run is None else self.run(block, x, self, keys_values, rows)


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward under adaLN-single modulation.

    Source: PixArt-alpha, arXiv 2310.00426, section 2.3.
    """

    def __init__(self, config: PixArtConfig, *, compress=False, operations=nn, dtype=None, device=None):
        super().__init__()
        factory = {"operations": operations, "dtype": dtype, "device": device}
        width = config.hidden_size
        self.scale_shift_table = make_table(6, width, **factory)
        self.attn = SelfAttention(config, compress, **factory)
        self.cross_attn = CrossAttention(config, **factory)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), width, **factory)
        self.modulate = modulate  # a training puts one in its place that knows how to make its results again

    def forward(self, x, inputs: BlockInputs, keys_values=None, rows=None):
        """x: (B, N, D). keys_values: of this block's cross-attention, (B, L, 2 D), if known. Returns (B, N, D).

        rows: see `modulation_rows`, if known.
        """
        if rows is None:
            rows = self.modulation_rows(inputs.modulation)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = rows.chunk(6, dim=1)  # (B, 1, D)
        if keys_values is None:
            keys_values = self.cross_attn.keys_values(inputs.caption)
        # The caption is read from the raw stream: no norm, no modulation, no gate.
        if inputs.around is not None:
            attended = inputs.around.self_attention(self.attn, self.modulate(x, shift_attn, scale_attn), inputs)
            x = torch.addcmul(x, gate_attn, attended)
            x = x + inputs.around.cross_attention(self.cross_attn, x, keys_values, inputs)
            return torch.addcmul(x, gate_mlp, self.mlp(self.modulate(x, shift_mlp, scale_mlp)))
        x = add_gated(
            x, gate_attn, self.attn(
                self.modulate(x, shift_attn, scale_attn), inputs.grid, inputs.self_attention, window=inputs.window
            ), inputs.overwrites,
        )  # fmt: skip
        # From here on x is this block's own.
        x = add_to(x, self.cross_attn(x, keys_values, inputs.caption_bias, inputs.cross_attention))
        return add_gated(x, gate_mlp, self.mlp(self.modulate(x, shift_mlp, scale_mlp)), True)

    def modulate_input(self, x, inputs: BlockInputs, index):
        """What self-attention reads of x where this is block `index` of the model: (B, N, D), of the same."""
        rows = self.modulation_rows(inputs.modulation) if inputs.rows is None else inputs.rows[index]
        shift, scale, *_ = rows.chunk(6, dim=1)
        return modulate(x, shift, scale)

    def modulation_rows(self, modulation):
        """Shifts, scales and gates of both branches: (B or 1, 6, D), of the same. The scales are whole factors."""
        return with_whole_scales(modulation + read_table(self.scale_shift_table, modulation))


def with_whole_scales(rows):
    """Adds the 1 that is no part of what the model holds of its scales. rows: (..., 6, D), changed in place."""
    rows[..., 1::3, :].add_(1)
    return rows


def add_gated(x, gate, branch, overwrites):
    """x + gate * branch, written into x where that is allowed and no gradient is needed."""
    if overwrites and x.dtype == branch.dtype and not (x.requires_grad or gate.requires_grad or branch.requires_grad):
        return x.addcmul_(gate, branch)
    return torch.addcmul(x, gate, branch)


def add_to(x, branch):
    """x + branch, written into x where no gradient is needed."""
    if x.dtype == branch.dtype and not (x.requires_grad or branch.requires_grad):
        return x.add_(branch)
    return x + branch


class FinalLayer(nn.Module):
    """Modulates by the timestep and projects every token to its patch."""

    def __init__(self, config: PixArtConfig, *, operations=nn, dtype=None, device=None):
        super().__init__()
        self.scale_shift_table = make_table(2, config.hidden_size, operations=operations, dtype=dtype, device=device)
        self.linear = operations.Linear(
            config.hidden_size, config.patch_size**2 * config.out_channels, dtype=dtype, device=device
        )

    def forward(self, x, condition):
        """x: (B, N, D). condition: (B or 1, D). Returns (B, N, patch_size**2 * C_out), the channel fastest."""
        rows = read_table(self.scale_shift_table, x) + condition.unsqueeze(1)  # (B or 1, 2, D)
        shift, scale = rows.chunk(2, dim=1)
        return self.linear(modulate(x, shift, 1 + scale))


class PixArt(nn.Module):
    """PixArt-alpha and PixArt-Sigma in one class; `config` says which.

    operations: where Linear, Conv2d, LayerNorm (and, optionally, Table) come from; a host passes its own.
    attention: function like `layers.attend`; PyTorch's scaled dot-product attention by default.
    Parameter names are the original checkpoints' keys. A file's `pos_embed` is ignored (the grid is computed for
    the picture at hand); `y_embedder.y_embedding` may be missing, see `has_null_caption`.
    Source: PixArt-alpha, arXiv 2310.00426; PixArt-Sigma, arXiv 2403.04692.
    """

    def __init__(self, config: PixArtConfig, *, operations=nn, attention=None, dtype=None, device=None):
        super().__init__()
        factory = {"operations": operations, "dtype": dtype, "device": device}
        width = config.hidden_size
        self.config = config
        self.attention = attention or attend
        self.has_null_caption = True
        self.x_embedder = PatchEmbed(config, **factory)
        self.t_embedder = ScalarEmbedder(width, **factory)
        if config.micro_condition:
            self.csize_embedder = ScalarEmbedder(width // 3, **factory)
            self.ar_embedder = ScalarEmbedder(width // 3, **factory)
        self.t_block = nn.Sequential(nn.SiLU(), operations.Linear(width, 6 * width, dtype=dtype, device=device))
        self.y_embedder = CaptionEmbedder(config, **factory)
        compressed = config.kv_compress_layers if config.kv_compress_ratio > 1 else ()
        self.blocks = nn.ModuleList(
            PixArtBlock(config, compress=index in compressed, **factory) for index in range(config.depth)
        )
        self.final_layer = FinalLayer(config, **factory)
        self.compiled = None  # a CompiledBlocks, of `acceleration`
        self._positions: dict[tuple, torch.Tensor] = {}
        self.register_load_state_dict_pre_hook(_accept_original_keys)

    def forward(
        self,
        latent,
        timestep,
        caption,
        caption_mask=None,
        resolution=None,
        aspect_ratio=None,
        control=None,
    ):
        """Predict the noise, and the variance channels when config.learn_sigma.

        latent: (B, C, H, W), scaled by the VAE factor; H and W in latent pixels, any parity.
        timestep: (B,) float in [0, 1000).
        caption: (B, L, caption_channels) T5 states, or what `project_caption` makes of them.
        caption_mask: (B, L) bool, True = keep.
        resolution: (B, 2) height and width in pixels; aspect_ratio: (B, 1) height / width. Both are read only
        when config.micro_condition, and default to the latent's own.
        control: list of (B, N, hidden_size) residuals; the i-th is added before block i + 1. In place of a residual
        there may be None, or a function of (tokens, BlockInputs) that computes it then: see `PixArtControlNet.attach`.
        Everything but the latent may have fewer rows, which are then tiled over the batch.
        Returns (B, C_out, H, W). Raises ValueError for shapes that do not fit the config.
        Source: PixArt-alpha, arXiv 2310.00426, section 2.3.
        """
        x, grid = self.embed_latent(latent)
        condition = self.embed_condition(latent, timestep, resolution, aspect_ratio)
        inputs = self.prepare_blocks(x, grid, condition, caption, caption_mask, self.attention)
        inputs = inputs._replace(overwrites=not control and not self.is_watched())
        for index, block in enumerate(self.blocks):
            x = inputs.run_block(block, add_control(x, control, index, inputs), index)
        return self.project(x, condition, grid, latent.shape)

    def is_watched(self) -> bool:
        """Whether anybody may hold what goes into a block or comes out of it: by hooks, or by recomputing it later."""
        return any(
            block._forward_hooks
            or block._forward_pre_hooks
            or type(block) is not PixArtBlock
            or "forward" in vars(block)  # another's in place of the class's
            for block in self.blocks
        )

    def embed_latent(self, latent):
        """(B, C, H, W) -> tokens (B, N, D) with their positions added, and their grid (rows, columns)."""
        if latent.ndim != 4 or latent.shape[1] != self.config.in_channels:
            raise ValueError(
                f"Latent shape mismatch: got {tuple(latent.shape)}, expected (batch, {self.config.in_channels}, "
                f"height, width). Connect a latent that was made for this PixArt model."
            )
        padded = pad_to_patches(latent, self.config.patch_size)
        grid = (padded.shape[2] // self.config.patch_size, padded.shape[3] // self.config.patch_size)
        return self.x_embedder(padded) + self.positions(grid, latent.dtype, latent.device), grid

    def positions(self, grid, dtype, device):
        """The position grid of (rows, columns) tokens: (1, N, D), computed once per size, dtype and device."""
        config = self.config
        numbers = (*grid, config.hidden_size, config.base_size, config.pe_scale)
        if torch.compiler.is_compiling():  # a table by numbers would be a graph for each size
            return position_grid(*numbers, device).to(dtype)
        key, kept = (grid, dtype, device), self._positions
        if key not in kept:
            table = position_grid(*numbers).to(device=device, dtype=dtype)
            while kept and (
                len(kept) >= POSITION_CACHE_SIZE
                or table.nbytes + sum(other.nbytes for other in kept.values()) > POSITION_CACHE_BYTES
            ):
                kept.pop(next(iter(kept)))
            kept[key] = table
        return kept[key]

    def embed_condition(self, latent, timestep, resolution=None, aspect_ratio=None):
        """Timestep, and the picture's size when config.micro_condition, in the latent's dtype.

        (B, D), or (1, D) where all rows are alike: a timestep and a size that occur once are embedded once. That is
        known on any device of a single row, and of rows that `expand` made of one.
        """
        batch, dtype = latent.shape[0], latent.dtype
        timestep = timestep if timestep.is_floating_point() else timestep.float()
        condition = self.t_embedder(distinct_rows(timestep, batch), dtype)
        if not self.config.micro_condition:
            return condition
        height, width = latent.shape[2:]
        if resolution is None:
            sides = (timestep.new_full((1, 1), side * LATENT_DOWNSCALE) for side in (height, width))
            resolution = torch.cat(list(sides), dim=1)
        if aspect_ratio is None:
            aspect_ratio = timestep.new_full((1, 1), height / width)
        size = self.csize_embedder(distinct_rows(resolution, batch), dtype)
        ratio = self.ar_embedder(distinct_rows(aspect_ratio, batch), dtype)
        rows = max(len(size), len(ratio))
        return condition + torch.cat([size.expand(rows, -1), ratio.expand(rows, -1)], dim=1)

    def project_caption(self, caption, *, keep_keys=True) -> ProjectedCaption:
        """What the blocks read of raw captions (B, L, caption_channels), to be given to `forward` at every step.

        Right until the weights change. keep_keys: also what every block makes of it, depth * B * L * 2 D numbers.
        Raises ValueError for captions of another width.
        """
        channels = self.config.caption_channels
        if caption.ndim != 3 or caption.shape[2] != channels:
            raise ValueError(
                f"Caption width mismatch: got {caption.shape[-1]}, expected {channels} in a (batch, length, width) "
                f"tensor. Connect the T5 text encoder that this PixArt model was trained with."
            )
        states = self.y_embedder(caption)
        keys = tuple(block.cross_attn.keys_values(states) for block in self.blocks) if keep_keys else None
        return ProjectedCaption(states, keys, self.stack_tables(states) if keep_keys else None)

    def stack_tables(self, like):
        """The modulation tables of all blocks, in the dtype of `like`: (depth, 1, 6, D).

        None where FSDP shards them, which makes a block's weights whole within that block alone.
        """
        tables = [block.scale_shift_table for block in self.blocks]
        if hasattr(self.blocks[0], "unshard"):
            return None
        if isinstance(tables[0], nn.Module):
            tables = [table(like) for table in tables]
        return torch.stack(tables).unsqueeze(1).to(like.dtype)

    def prepare_blocks(self, x, grid, condition, caption, caption_mask, attention) -> BlockInputs:
        """Everything that the blocks share, from the condition (B or 1, D) and the caption, see `forward`."""
        if not isinstance(caption, ProjectedCaption):
            if caption_mask is not None and caption_mask.shape[-1] == caption.shape[1]:
                caption, caption_mask = lengthen(blank_hidden(caption, caption_mask), caption_mask.flatten(1))
            caption = self.project_caption(caption.to(x.dtype), keep_keys=False)
        batch, length = x.shape[0], caption.states.shape[1]
        bias = None
        if caption_mask is not None:
            if caption_mask.shape[-1] != length:
                raise ValueError(
                    f"Caption mask length mismatch: got {caption_mask.shape[-1]}, expected {length}. "
                    f"Encode the caption and its mask with the same node."
                )
            bias = caption_bias(tile_rows(caption_mask.flatten(1), batch), x.dtype)
        modulation = self.t_block(condition).unflatten(1, (6, -1))
        tables = self.stack_tables(x) if caption.tables is None else caption.tables
        rows = None if tables is None else with_whole_scales(modulation + tables).unbind()  # of all blocks at once
        states = tile_rows(caption.states, batch)
        inputs = BlockInputs(modulation, states, bias, grid, attention, attention, caption.keys_values, rows)
        return inputs if self.compiled is None else self.compiled.enter(inputs, x)

    def project(self, x, condition, grid, latent_shape, channels=None):
        """Tokens (B, N, D) -> the first `channels` of the prediction (all by default), cropped to the latent's size."""
        size, (rows, columns) = self.config.patch_size, grid
        x = self.final_layer(x, condition)
        x = x.reshape(x.shape[0], rows, columns, size, size, self.config.out_channels)[..., :channels]
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C_out, rows * size, columns * size)
        return x[:, :, : latent_shape[2], : latent_shape[3]]


def distinct_rows(values, batch):
    """values tiled over the batch, (B, ...), or the one row that stands for all, (1, ...)."""
    return values if values.shape[0] == 1 else common_row(tile_rows(values, batch))


def add_control(x, control, index, inputs: BlockInputs):
    """Adds the residual that belongs in front of block `index`; block 0 has none. See PixArt.forward."""
    if not control or index == 0 or index > len(control) or control[index - 1] is None:
        return x
    residual = control[index - 1]
    return x + (residual(x, inputs) if callable(residual) else residual).to(x)


def caption_bias(caption_mask, dtype):
    """(B, L) with True = keep -> (B, 1, 1, L) to add to the attention's logits.

    The lowest finite number stands for minus infinity, so that a caption without tokens gives no NaN.
    It lies in rows of a multiple of 8 numbers: out of others PyTorch's attention makes such rows on a GPU, every time.
    """
    hidden = (caption_mask == 0)[:, None, None]
    length = hidden.shape[3]
    rows = torch.zeros(len(hidden), 1, 1, length + -length % MASK_ALIGNMENT, dtype=dtype, device=hidden.device)
    return rows[..., :length].masked_fill_(hidden, torch.finfo(dtype).min)


def pad_to_patches(latent, patch_size):
    """Pads the bottom and the right of (B, C, H, W) up to whole patches.

    By reflection: neighbouring content goes on, and within a patch the noise stays independent.
    """
    if torch.compiler.is_compiling() and 1 not in latent.shape[2:]:  # whether a size is odd would be a graph each
        rows, columns = (reflected(side, patch_size, latent.device) for side in latent.shape[2:])
        return latent.index_select(2, rows).index_select(3, columns)
    bottom, right = -latent.shape[2] % patch_size, -latent.shape[3] % patch_size
    if not bottom and not right:
        return latent
    reflects = bottom < latent.shape[2] and right < latent.shape[3]
    return F.pad(latent, (0, right, 0, bottom), mode="reflect" if reflects else "replicate")


def reflected(side, patch_size, device):
    """Which of `side` numbers, at least 2, stands where once they are reflected up to whole patches: (side',) long."""
    place = torch.arange((side + patch_size - 1) // patch_size * patch_size, device=device)
    return torch.where(place < side, place, 2 * (side - 1) - place)


def initialize_weights(model: PixArt, generator=None):
    """Gives a model the original's initial weights, for training from scratch.

    Source: PixArt-alpha's training code: xavier everywhere, N(0, 0.02) in the embedders, zeros where a branch ends.
    """
    normal = partial(nn.init.normal_, std=0.02, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1), generator=generator)
            nn.init.zeros_(module.bias)
    for embedder in (model.t_embedder, *(getattr(model, n, None) for n in ("csize_embedder", "ar_embedder"))):
        if embedder is not None:
            normal(embedder.mlp[0].weight)
            normal(embedder.mlp[2].weight)
    for layer in (model.t_block[1], model.y_embedder.y_proj.fc1, model.y_embedder.y_proj.fc2):
        normal(layer.weight)
    for layer in (model.final_layer.linear, *(block.cross_attn.proj for block in model.blocks)):
        nn.init.zeros_(layer.weight)
    width = model.config.hidden_size
    for owner in (model.final_layer, *model.blocks):
        nn.init.normal_(owner.scale_shift_table, std=width**-0.5, generator=generator)
    for block in model.blocks:
        if block.attn.compress:  # starts as plain averaging
            nn.init.constant_(block.attn.sr.weight, model.config.kv_compress_ratio**-2)
    null = model.y_embedder.y_embedding
    nn.init.normal_(null, std=null.shape[1] ** -0.5, generator=generator)


def _accept_original_keys(model, state_dict, prefix, *_):
    """Before a strict load: drops what is recomputed, and fills in what a diffusers file does not hold."""
    for key in RECOMPUTED_KEYS:
        state_dict.pop(prefix + key, None)
    own = {f"y_embedder.{name}": like for name, like in model.y_embedder.state_dict().items()}
    for key in OPTIONAL_KEYS:
        name = key if key in own else f"{key}.weight"  # a module where the host needs one, see `make_table`
        model.has_null_caption = prefix + name in state_dict
        if not model.has_null_caption:
            state_dict[prefix + name] = torch.zeros(own[name].shape, dtype=own[name].dtype)
