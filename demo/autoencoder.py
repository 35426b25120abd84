"""The demo's autoencoder: TAESD's layout (MIT, madebyollin/taesd), with an encoder that is known in closed form.

The four latent channels are averages over 8x8 pixels: brightness, two colour differences, and saturation. So the
encoder needs no training, latents are smooth, and the decoder alone learns, as a superresolution of flat shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64
LATENT_CHANNELS = 4
VAE_SCALE = 0.18215

# Rows: brightness, red against blue, green against purple, saturation; columns: mean red, green, blue, saturation.
_MIX = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0], [0.5, 0.0, -0.5, 0.0], [-0.25, 0.5, -0.25, 0.0], [0.0, 0.0, 0.0, 1.0]])
# About the mean and deviation of the mixes over random scenes, so that the latents' deviation is near one.
LATENT_MEAN = torch.tensor([0.53, 0.04, -0.015, 0.21])
LATENT_STD = torch.tensor([0.30, 0.14, 0.10, 0.25])


class Clamp(nn.Module):
    """Soft clamp to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions with a skip around them."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.conv(x) + x)


def _conv(in_channels: int, out_channels: int, **options) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, **options)


def _blocks(count: int) -> list[nn.Module]:
    return [Block(WIDTH) for _ in range(count)]


class Encoder(nn.Sequential):
    """(B, 3, 8h, 8w) in [0, 1] to (B, 4, h, w)."""

    def __init__(self):
        stages: list[nn.Module] = [_conv(3, WIDTH), *_blocks(1)]
        for _ in range(3):
            stages += [_conv(WIDTH, WIDTH, stride=2, bias=False), *_blocks(3)]
        super().__init__(*stages, _conv(WIDTH, LATENT_CHANNELS))


class Decoder(nn.Sequential):
    """(B, 4, h, w) to (B, 3, 8h, 8w), about [0, 1]."""

    def __init__(self):
        stages: list[nn.Module] = [Clamp(), _conv(LATENT_CHANNELS, WIDTH), nn.ReLU()]
        for _ in range(3):
            stages += [*_blocks(3), nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, bias=False)]
        super().__init__(*stages, *_blocks(1), _conv(WIDTH, 3))


class Autoencoder(nn.Module):
    """Encoder and decoder under the names and scalars that ComfyUI's TAESD reads.

    encode and decode work on the model's scale (deviation about one); ComfyUI's latents are those over VAE_SCALE.
    """

    def __init__(self):
        super().__init__()
        self.taesd_encoder = Encoder()
        self.taesd_decoder = Decoder()
        self.vae_scale = nn.Parameter(torch.tensor(VAE_SCALE))
        self.vae_shift = nn.Parameter(torch.tensor(0.0))

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, 8h, 8w) in [0, 1] to (B, 4, h, w)."""
        return self.taesd_encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) to (B, 3, 8h, 8w) in [0, 1]."""
        return self.taesd_decoder(latents).clamp(0, 1)


def average_latents(pictures: Tensor) -> Tensor:
    """What the encoder computes, directly: (B, 3, 8h, 8w) in [0, 1] to (B, 4, h, w)."""
    saturation = pictures.amax(1, keepdim=True) - pictures.amin(1, keepdim=True)
    means = F.avg_pool2d(torch.cat([pictures, saturation], 1), 8)  # (B, 4, h, w)
    mixed = torch.einsum("om,bmhw->bohw", _MIX, means)
    return (mixed - LATENT_MEAN[:, None, None]) / LATENT_STD[:, None, None]


@torch.no_grad()
def set_averaging_encoder(encoder: Encoder) -> None:
    """Give the encoder the weights with which it computes `average_latents` exactly."""
    for parameter in encoder.parameters():
        parameter.zero_()
    for channel in range(3):
        encoder[0].weight[channel, channel, 1, 1] = 1
    # max - min of three numbers is half the sum of their absolute differences; |a| = relu(a) + relu(-a).
    first, second, third = encoder[1].conv[0], encoder[1].conv[2], encoder[1].conv[4]
    for k, (plus, minus) in enumerate([(0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (0, 2)]):
        first.weight[k, plus, 1, 1], first.weight[k, minus, 1, 1] = 1, -1
        second.weight[k, k, 1, 1] = 1
        third.weight[3, k, 1, 1] = 0.5
    for module in encoder:
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            for channel in range(4):
                module.weight[channel, channel, 1:, 1:] = 0.25
    encoder[-1].weight[:, :4, 1, 1] = _MIX / LATENT_STD[:, None]
    encoder[-1].bias.copy_(-LATENT_MEAN / LATENT_STD)


@torch.no_grad()
def set_enlarging_decoder(decoder: Decoder) -> None:
    """Start the decoder as a plain 8x enlargement of the mean colours; the other channels stay random."""
    to_rgb = torch.linalg.inv(_MIX[:3, :3]) * LATENT_STD[:3]
    first, last = decoder[1], decoder[-1]
    for convolution in (first, last):
        convolution.weight[:3] = 0
    first.weight[:3, :3, 1, 1] = to_rgb
    first.bias[:3] = torch.linalg.inv(_MIX[:3, :3]) @ LATENT_MEAN[:3]
    last.weight *= 0.1
    last.bias.zero_()
    for channel in range(3):
        last.weight[channel, channel, 1, 1] = 1
    for module in decoder:
        if isinstance(module, Block):
            module.conv[4].weight *= 0.2
            module.conv[4].bias.zero_()
            module.conv[4].weight[:3] *= 0.1
        elif isinstance(module, nn.Conv2d) and module.bias is None:
            module.weight[:3] = 0
            for channel in range(3):
                module.weight[channel, channel, 1, 1] = 1
