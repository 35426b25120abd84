"""Pictures between the host and PIL, and what nodes make of them."""

import numpy as np
import torch
from comfy_api.latest import ui
from PIL import Image

from ...pixart.drawing.sheets import comparison_grid, labelled_sheet

PICTURES = "pixart_pictures"


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """IMAGE (B, H, W, C) in [0, 1], C 1, 3 or 4 -> pictures."""
    values = (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(each.squeeze(2) if each.shape[2] == 1 else each).convert("RGB") for each in values]


def to_image(picture: Image.Image) -> torch.Tensor:
    """A picture -> IMAGE (1, H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def show_picture(picture: Image.Image, cls: type) -> dict:
    """What a node's `ui` says of a picture that is no result: under a key that web/ draws, where programs do not look.

    cls: the node's class.
    """
    return {PICTURES: ui.PreviewImage(to_image(picture), cls=cls).as_dict()["images"]}


def draw_sheet(batches: list[torch.Tensor], labels: list[str], columns: int) -> torch.Tensor:
    """Every picture of some IMAGEs with its label; a label for each picture, for each IMAGE, or none."""
    pictures = [picture for batch in batches for picture in to_pil(batch)]
    if len(labels) == len(batches) != len(pictures):
        labels = [label for label, batch in zip(labels, batches, strict=True) for _ in batch]
    return to_image(labelled_sheet(pictures, labels, columns or None))


def draw_grid(batches: list[torch.Tensor], rows: list[str], columns: list[str], title: str) -> torch.Tensor:
    """One cell for each IMAGE; of more than one picture, the cell shows all."""
    cells = [_mosaic(to_pil(batch)) for batch in batches]
    return to_image(comparison_grid(cells, rows, columns, title))


def _mosaic(pictures: list[Image.Image]) -> Image.Image:
    return pictures[0] if len(pictures) == 1 else labelled_sheet(pictures, [])
