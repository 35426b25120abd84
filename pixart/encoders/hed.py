"""The edge detector that PixArt-delta's ControlNet was trained with: soft, holistically nested edges."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from ..quoting import plain, shorten

WIDTHS = (64, 128, 256, 512, 512)  # of the published network; each block after the first halves the resolution
CONVOLUTIONS = (2, 2, 3, 3, 3)
LEAST_PX = 2 ** (len(WIDTHS) - 1)  # a shorter side would vanish in the last block
FILE_NAME = "ControlNetHED.pth"


class HEDBlock(nn.Module):
    """3x3 convolutions with ReLU, and the projection of their result to one map of logits."""

    def __init__(self, in_channels: int, width: int, count: int, **factory):
        super().__init__()
        channels = (in_channels, *[width] * count)
        pairs = zip(channels[:-1], channels[1:], strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1, **factory) for before, after in pairs)
        self.projection = nn.Conv2d(width, 1, 1, **factory)

    def forward(self, x: torch.Tensor, pool: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (B, C, h, w). pool: halve the resolution first, rounding down. Returns features and logits (B, 1, ...)."""
        if pool:
            x = F.max_pool2d(x, 2)
        for convolution in self.convs:
            x = F.relu_(convolution(x))
        return x, self.projection(x)


class HED(nn.Module):
    """Five blocks at falling resolution, each with a map of edge logits.

    Parameters have the names of ControlNetHED.pth. widths: channels of the blocks.
    Source: Holistically-Nested Edge Detection, arXiv 1504.06375, section 3, as lllyasviel retrained it for
    ControlNet; PixArt-alpha, diffusion/model/hed.py.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS, *, dtype=None, device=None):
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1, dtype=dtype, device=device))
        before = 3
        for number, (width, count) in enumerate(zip(widths, CONVOLUTIONS, strict=True), 1):
            setattr(self, f"block{number}", HEDBlock(before, width, count, dtype=dtype, device=device))
            before = width

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Logits of all blocks, finest first. images: (B, 3, H, W) with values from 0 to 255, sides from LEAST_PX on.

        Returns five maps (B, 1, H / 2^i, W / 2^i), sizes rounded down.
        """
        x, maps = images - self.norm, []
        for index, block in enumerate((self.block1, self.block2, self.block3, self.block4, self.block5)):
            x, logits = block(x, pool=index > 0)
            maps.append(logits)
        return maps


def detect_edges(network: HED, images: torch.Tensor) -> torch.Tensor:
    """Soft edges, bright on black: (B, 3, H, W) in [0, 1] -> (B, 1, H, W) in [0, 1], any H and W.

    The maps are averaged as logits, before the sigmoid. Pictures with a side below LEAST_PX are continued by their
    border pixels.
    """
    height, width = images.shape[-2:]
    missing = max(LEAST_PX - height, 0), max(LEAST_PX - width, 0)
    padded = F.pad(images, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else images
    size = padded.shape[-2:]
    maps = [F.interpolate(logits, size, mode="bilinear", align_corners=False) for logits in network(padded * 255)]
    return torch.cat(maps, 1).mean(1, keepdim=True).sigmoid()[..., :height, :width]


def make_hed(state_dict: Mapping[str, torch.Tensor], name: str) -> HED:
    """The network of a file, in float32 and of the widths that the file has. name: the file's, for errors.

    Raises ValueError for other networks and incomplete files.
    """
    widths = [state_dict.get(f"block{number}.convs.0.bias") for number in range(1, len(WIDTHS) + 1)]
    if any(width is None for width in widths) or "norm" not in state_dict:
        raise ValueError(
            f"Not the HED edge detector: got {_some(state_dict)} in {shorten(name)}, expected norm and block1 to "
            f"block5 as in {FILE_NAME}. Choose that file, or another method."
        )
    network = HED(tuple(len(width) for width in widths))
    try:
        network.load_state_dict({key: value.float() for key, value in state_dict.items()})
    except RuntimeError as error:
        raise ValueError(
            f"Damaged HED file: got {plain(str(error).splitlines()[1].strip(), 200)} in {shorten(name)}, expected the "
            f"tensors of {FILE_NAME}. Download it again."
        ) from error
    return network.eval().requires_grad_(False)


def _some(state_dict: Mapping[str, torch.Tensor]) -> str:
    """A few of a file's keys."""
    return ", ".join(sorted(state_dict)[:3]) or "no tensors"
