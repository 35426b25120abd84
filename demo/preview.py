"""Fit the colours in which ComfyUI previews the demo's latents while it samples.

`python dev.py run -m pixart_pack.demo.preview` prints them, for nodes/host/denoiser/latent.py.
"""

import sys
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoder_stage import to_tensor
from .generate import load_autoencoder
from .scenes import draw_scene, random_scene
from .train import VAE_FILE

SCENES = 64


def fit_preview(vae_file: Path = VAE_FILE) -> tuple[Tensor, Tensor]:
    """Factors (4, 3) and bias (3,) with which `latent @ factors + bias` is nearest to the mean colours, in [-1, 1].

    The latents are on the model's scale, as the host previews them.
    """
    rng = Random("preview")
    pictures = to_tensor([draw_scene(random_scene(rng, 1 + number % 3)) for number in range(SCENES)])
    with torch.no_grad():
        latents = load_autoencoder(vae_file).encode(pictures)
    colours = F.avg_pool2d(pictures * 2 - 1, pictures.shape[-1] // latents.shape[-1])
    rows, wanted = (each.movedim(1, -1).flatten(0, 2) for each in (latents, colours))
    solution = torch.linalg.lstsq(torch.cat((rows, torch.ones(len(rows), 1)), 1), wanted).solution
    return solution[:-1], solution[-1]


def main() -> None:
    factors, bias = fit_preview()
    for values in (*factors, bias):
        sys.stdout.write(f"({', '.join(f'{value:.4f}' for value in values.tolist())}),\n")


if __name__ == "__main__":
    main()
