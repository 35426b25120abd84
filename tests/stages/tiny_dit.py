"""A DiT as its paper describes it, in few lines. Source: arXiv 2212.09748."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def sines(positions: torch.Tensor, channels: int) -> torch.Tensor:
    """(N,) -> (N, channels): sines, then cosines, of falling frequency."""
    frequency = 10000 ** (-torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))
    phase = torch.outer(positions.double(), frequency)
    return torch.cat([phase.sin(), phase.cos()], 1)


def square_positions(side: int, width: int) -> torch.Tensor:
    """(1, side * side, width): the column in the first half of the channels, the row in the second."""
    column, row = torch.arange(side).repeat(side), torch.arange(side).repeat_interleave(side)
    return torch.cat([sines(column, width // 2), sines(row, width // 2)], 1)[None].float()


class Embedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        frequency = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        phase = t[:, None].float() * frequency
        return self.mlp(torch.cat([phase.cos(), phase.sin()], 1))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def make_modulation(width, parts):
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn, self.mlp, self.adaLN_modulation = Attention(width, heads), Mlp(width), make_modulation(width, 6)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate1[:, None] * self.attn(modulated(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulated(x, shift2, scale2))


class Final(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.linear, self.adaLN_modulation = nn.Linear(width, outputs), make_modulation(width, 2)

    def forward(self, x, c):
        return self.linear(modulated(x, *self.adaLN_modulation(c).chunk(2, 1)))


class DiT(nn.Module):
    """classes: without the one that stands for none, which is the table's last row."""

    def __init__(self, depth=3, width=48, heads=1, side=4, classes=10):
        super().__init__()
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(4, width, 2, 2)
        self.t_embedder, self.y_embedder = Embedder(width), nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, width)
        self.pos_embed = nn.Parameter(square_positions(side, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = Final(width, 2 * 2 * 8)

    def states(self, x, t, y):
        """The tokens after every block, and the prediction (B, 8, H, W)."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        tokens, states = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed, []
        for block in self.blocks:
            tokens = block(tokens, c)
            states.append(tokens)
        out = self.final_layer(tokens, c).reshape(-1, height, width, 2, 2, 8)
        return [*states, torch.einsum("nhwpqc->nchpwq", out).reshape(-1, 8, 2 * height, 2 * width)]


def make_dit(seed=0, **sizes) -> DiT:
    """One with random weights in which every path counts."""
    torch.manual_seed(seed)
    model = DiT(**sizes).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            parameter.normal_(std=0.1)
    return model
