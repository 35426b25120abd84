"""Embedders, attention, feed-forward and modulation: the parts that a PixArt block is made of."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

FREQUENCY_CHANNELS = 256  # width of the sinusoid in front of every scalar embedder
MAX_PERIOD = 10000.0
NORM_EPS = 1e-6
LENGTH_STEPS = {"cuda": 32}  # by kind of device, see `masked_length`
LONG_SEQUENCE = 2048  # tokens, see `gather_heads`
AFFINE_NORM_EPS = 1e-5  # the qk norm's and the compression norm's, PyTorch's default

Attention = Callable[..., torch.Tensor]


def attend(q, k, v, num_heads, mask=None):
    """Scaled dot-product attention, the default of every PixArt.

    q: (B, N, D). k, v: (B, L, D). mask: additive, (B, 1, 1, L) in q's dtype, or None.
    Returns (B, N, D).
    """
    q, k, v = (split_heads(t, num_heads) for t in (q, k, v))  # (B, heads, N, D / heads)
    k, v = gather_heads(k), gather_heads(v)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def split_heads(x, num_heads):
    """Views (B, N, D) as (B, heads, N, D / heads)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def gather_heads(x):
    """(B, heads, L, d) -> the same numbers, laid out head by head where that saves the CPU more than the copy costs.

    Every query reads all keys and values. Out of a shared qkv they lie far apart: at 4096 tokens attention then takes
    a sixth longer, at 2304 a sixteenth, at 256 less. Compiled, always: a length to look at would be a graph more.
    """
    if x.device.type != "cpu":
        return x
    return x.contiguous() if torch.compiler.is_compiling() or x.shape[2] >= LONG_SEQUENCE else x


def blank_hidden(caption, caption_mask):
    """Captions (B, L, D) with zeros where the mask (B, L) hides them: what is not finite there would reach the sum of
    an attention in spite of its weight 0. A mask of fewer rows is repeated; of one with more, what all of them hide.
    """
    hidden = caption_mask.flatten(1) == 0
    if hidden.shape[0] > caption.shape[0]:
        hidden = hidden.all(dim=0, keepdim=True)
    return caption.masked_fill(tile_rows(hidden, caption.shape[0])[..., None], 0.0)


def masked_length(length, device):
    """Tokens that a caption of `length` gets where a mask is there anyway: rounded up on a GPU.

    Each new length is a new plan of cuDNN's attention there: of alpha's 120 lengths 4 are left, of Sigma's 300 10.
    """
    return length + -length % LENGTH_STEPS.get(torch.device(device).type, 1)


def lengthen(caption, caption_mask):
    """Captions (B, L, D) and their mask (B', L), True = keep, both with L as `masked_length` has it."""
    missing = masked_length(caption.shape[1], caption.device) - caption.shape[1]
    if not missing:
        return caption, caption_mask
    return F.pad(caption, (0, 0, 0, missing)), F.pad(caption_mask, (0, missing))


def tile_rows(x, batch):
    """Repeats the rows of x, as a whole, until there are `batch` of them: [a, b] -> [a, b, a, b].

    Raises ValueError when the rows of x do not divide the batch.
    """
    rows = x.shape[0]
    if rows == batch:
        return x
    if rows == 0 or batch % rows:
        raise ValueError(
            f"Batch mismatch: got {rows} rows of conditioning, expected {batch} or a divisor of it. "
            f"Give as many captions and sizes as there are latents, or one."
        )
    return x.repeat(batch // rows, *[1] * (x.ndim - 1))


def modulate(x, shift, scale):
    """Normalises x over its channels, then scales and shifts it. x: (B, N, D); shift, scale: (B or 1, 1, D).

    scale is the factor itself: the model's tables hold what it has above 1, see `PixArtBlock.modulation_rows`.
    """
    if shift.shape[0] == 1 and shift.dtype == x.dtype:  # alike for the whole batch: one pass over x in place of two
        return F.layer_norm(x, x.shape[-1:], scale.flatten(), shift.flatten(), eps=NORM_EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), scale)


def common_row(values):
    """The first row alone where all rows are alike and it costs nothing to know: (B, ...) -> (1, ...) or (B, ...).

    Rows that `expand` made of one share its memory. Others are compared on the CPU; on another device, looking would
    wait for all work that is queued there.
    """
    if values.stride(0) == 0:
        return values[:1]
    if (
        values.device.type != "cpu"
        or torch.compiler.is_compiling()
        or not torch.equal(values, values[:1].expand_as(values))
    ):
        return values
    return values[:1]


def position_grid(height, width, hidden_size, base_size, pe_scale, device="cpu"):
    """Sinusoidal positions of a token grid, in float64 (on MPS float32): (1, height * width, hidden_size).

    Both axes span [0, base_size / pe_scale), whatever the aspect ratio. The first half of the channels holds the
    column, the second the row; in each half the sines stand before the cosines.
    Source: PixArt-alpha, arXiv 2310.00426, section 2.3, after DiffFit's scaled positions.
    """
    quarter = hidden_size // 4
    factory = {"dtype": torch.float32 if torch.device(device).type == "mps" else torch.float64, "device": device}
    frequency = MAX_PERIOD ** (-torch.arange(quarter, **factory) / quarter)

    def encode(count):
        position = torch.arange(count, **factory) / (count / base_size) / pe_scale
        phase = torch.outer(position, frequency)
        return torch.cat([phase.sin(), phase.cos()], dim=1)  # (count, hidden_size / 2)

    column = encode(width).unsqueeze(0).expand(height, -1, -1)
    row = encode(height).unsqueeze(1).expand(-1, width, -1)
    return torch.cat([column, row], dim=2).reshape(1, height * width, hidden_size)


def sinusoid(values, channels=FREQUENCY_CHANNELS):
    """Cosine then sine features of scalars: (M,) -> (M, channels), in float32, or float64 for float64 values."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    half = channels // 2
    step = torch.arange(half, dtype=dtype, device=values.device)
    frequency = torch.exp(-math.log(MAX_PERIOD) * step / half)
    phase = values.to(dtype).unsqueeze(1) * frequency
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def average_windows(x, grid, factor):
    """The means of factor x factor windows of a token grid: (B, N, D) -> (B, M, D), row by row.

    grid: (rows, columns) of the N tokens. Windows at the bottom and the right are smaller where factor does not divide.
    """
    if factor == 1:
        return x
    x = x.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, D, rows, columns)
    x = F.avg_pool2d(x, factor, ceil_mode=True, count_include_pad=False)
    return x.flatten(2).transpose(1, 2)


class PatchEmbed(nn.Module):
    """Cuts a latent into patches, a token each."""

    def __init__(self, config, *, operations=nn, dtype=None, device=None):
        super().__init__()
        size = config.patch_size
        self.proj = operations.Conv2d(
            config.in_channels, config.hidden_size, kernel_size=size, stride=size, dtype=dtype, device=device
        )

    def forward(self, latent):
        """(B, C, H, W) -> (B, N, D), row by row."""
        # Contiguous, since everything behind keeps the layout, and every norm would copy a transposed one.
        return self.proj(latent).flatten(2).transpose(1, 2).contiguous()


class ScalarEmbedder(nn.Module):
    """Embeds scalars: the timestep, or the picture's size and aspect ratio."""

    def __init__(self, channels, *, operations=nn, dtype=None, device=None):
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(FREQUENCY_CHANNELS, channels, dtype=dtype, device=device),
            nn.SiLU(),
            operations.Linear(channels, channels, dtype=dtype, device=device),
        )

    def forward(self, values, dtype):
        """(B,) -> (B, channels), or (B, S) -> (B, S * channels), in dtype."""
        features = sinusoid(values.flatten()).to(dtype)
        return self.mlp(features).reshape(values.shape[0], -1)


class Mlp(nn.Module):
    """Two linear layers with the tanh-approximated GELU between them."""

    def __init__(self, channels, hidden_channels, out_channels, *, operations=nn, dtype=None, device=None):
        super().__init__()
        self.fc1 = operations.Linear(channels, hidden_channels, dtype=dtype, device=device)
        self.fc2 = operations.Linear(hidden_channels, out_channels, dtype=dtype, device=device)

    def forward(self, x):
        hidden = self.fc1(x)
        if hidden.requires_grad:
            return self.fc2(F.gelu(hidden, approximate="tanh"))
        # In place: the largest tensor of the model, and fresh memory costs the CPU as much as the function itself.
        return self.fc2(torch.ops.aten.gelu_(hidden, approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Projects T5 states to the model's width, and holds the caption that stands for "no caption"."""

    def __init__(self, config, *, operations=nn, dtype=None, device=None):
        super().__init__()
        self.y_proj = Mlp(
            config.caption_channels,
            config.hidden_size,
            config.hidden_size,
            operations=operations,
            dtype=dtype,
            device=device,
        )
        rows, width = config.caption_length, config.caption_channels
        if hasattr(operations, "Table"):
            self.y_embedding = operations.Table(rows, width, dtype=dtype, device=device)
        else:  # a buffer, as in the original: it is never trained and has no optimiser state
            self.register_buffer("y_embedding", torch.zeros(rows, width, dtype=dtype, device=device))

    def forward(self, caption):
        """(B, L, caption_channels) -> (B, L, D)."""
        return self.y_proj(caption)


class SelfAttention(nn.Module):
    """Attention among the tokens of a picture, with optional qk norm and key-value compression."""

    def __init__(self, config, compress, *, operations=nn, dtype=None, device=None):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = operations.Linear(width, width * 3, **factory)
        self.proj = operations.Linear(width, width, **factory)
        if config.qk_norm:
            self.q_norm = operations.LayerNorm(width, eps=AFFINE_NORM_EPS, **factory)
            self.k_norm = operations.LayerNorm(width, eps=AFFINE_NORM_EPS, **factory)
        if compress:
            ratio = config.kv_compress_ratio
            self.sr = operations.Conv2d(width, width, kernel_size=ratio, stride=ratio, groups=width, **factory)
            self.norm = operations.LayerNorm(width, eps=AFFINE_NORM_EPS, **factory)
        self.qk_norm = config.qk_norm
        self.compress = compress

    def forward(self, x, grid, attention, context=None, values=None, window=1):
        """x: (B, N, D). grid: (rows, columns) of the N tokens. Returns (B, N, D).

        context, values: what keys and values are made of, where a host's patches put something else in place of x.
        window: side of the windows of tokens whose keys and values are averaged, where the model itself does not
        compress them.
        """
        q, k, v = self.qkv(x).chunk(3, dim=2)
        if context is not None and context is not x:
            k, v = self.qkv(context).chunk(3, dim=2)[1:]
        if values is not None and values is not context:
            v = self.qkv(values).chunk(3, dim=2)[2]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.compress:
            k, v = self.compress_tokens(k, grid), self.compress_tokens(v, grid)
        elif window > 1 and k.shape[1] == q.shape[1]:
            k, v = average_windows(k, grid, window), average_windows(v, grid, window)
        return self.proj(attention(q, k, v, self.num_heads))

    def compress_tokens(self, x, grid):
        """(B, N, D) -> (B, N / ratio**2, D) by a strided depthwise convolution over the token grid.

        Source: PixArt-Sigma, arXiv 2403.04692, section 3.3.
        """
        x = x.transpose(1, 2).unflatten(2, grid)  # (B, D, rows, columns)
        ratio = self.sr.kernel_size[0]
        missing = [max(0, ratio - side) for side in grid]
        if any(missing):  # a picture of fewer tokens than one window has: its last row or column fills it
            x = F.pad(x, (0, missing[1], 0, missing[0]), mode="replicate")
        return self.norm(self.sr(x).flatten(2).transpose(1, 2))


class CrossAttention(nn.Module):
    """Attention from the picture's tokens to the caption's."""

    def __init__(self, config, *, operations=nn, dtype=None, device=None):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.q_linear = operations.Linear(width, width, dtype=dtype, device=device)
        self.kv_linear = operations.Linear(width, width * 2, dtype=dtype, device=device)
        self.proj = operations.Linear(width, width, dtype=dtype, device=device)

    def keys_values(self, caption):
        """(B, L, D) -> keys and values side by side, (B, L, 2 D): the same at every step of a picture."""
        return self.kv_linear(caption)

    def forward(self, x, keys_values, caption_bias, attention):
        """x: (B, N, D). keys_values: (B, L, 2 D). caption_bias: (B, 1, 1, L) additive, or None. Returns (B, N, D)."""
        k, v = keys_values.chunk(2, dim=2)
        return self.proj(attention(self.q_linear(x), k, v, self.num_heads, mask=caption_bias))


def make_table(rows, width, *, operations=nn, dtype=None, device=None):
    """Learned modulation rows: a plain parameter, or `operations.Table` where the host patches modules only."""
    table = getattr(operations, "Table", None)
    if table is not None:
        return table(rows, width, dtype=dtype, device=device)
    return nn.Parameter(torch.randn(rows, width, dtype=dtype, device=device) / width**0.5)


def read_table(table, x):
    """The table's rows, on x's device and in its dtype: (rows, D)."""
    return table(x) if isinstance(table, nn.Module) else table.to(x)
