"""Grows workflows in API format, node by node, and writes the tiny models that they load."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from pixart_pack.pixart.checkpoint import config_to_tensor
from pixart_pack.tests.tiny_pixart import make_weights
from pixart_pack.tests.tiny_t5 import SIZES, VOCAB_SIZE, make_t5, weights_of

VAE = "pixart_demo_vae.safetensors"  # the demo's: the smallest that decodes
RANK = 4


class Graph:
    """A workflow: `add` gives the link to a node's first output, `nodes` is what the server takes."""

    def __init__(self):
        self.nodes = {}

    def add(self, class_type: str, **inputs) -> list:
        """A node; inputs that are links come from `add`. Returns [its number, 0]."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": class_type, "inputs": inputs}
        return [number, 0]


class PictureGraph(Graph):
    """The usual PixArt workflow up to the conditioning; `sample` and `save` end it."""

    def __init__(self, checkpoint: str, t5: str, text="a red circle on a white background", **load):
        super().__init__()
        self.model = self.add("PixArtLoadCheckpoint", checkpoint=checkpoint, **load)
        self.clip = self.add("PixArtLoadT5", text_encoder=t5)
        self.vae = self.add("VAELoader", vae_name=VAE)
        self.positive = self.add("PixArtTextEncode", clip=self.clip, text=text)
        self.negative = self.add("PixArtNegative", mode="empty", clip=self.clip)

    def empty(self, width=64, height=64, batch=1) -> list:
        """An empty latent."""
        return self.add("EmptyLatentImage", width=width, height=height, batch_size=batch)

    def sample(self, latent, **settings) -> list:
        """KSampler: 2 steps of Euler unless settings say otherwise. Returns the latent."""
        usual = {"seed": 7, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        links = {"model": self.model, "positive": self.positive, "negative": self.negative}
        return self.add("KSampler", latent_image=latent, **{**links, **usual, **settings})

    def save(self, latent) -> dict:
        """Decodes and saves the pictures. Returns the nodes."""
        pixels = self.add("VAEDecode", samples=latent, vae=self.vae)
        self.add("SaveImage", images=pixels, filename_prefix="queue")
        return self.nodes


def write_pixart(path: Path, config, seed=0, dtype=torch.float32) -> None:
    """A tiny PixArt in a file of the original layout, its configuration with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(dtype) for name, weight in make_weights(config, seed).items()}
    save_file({**weights, "pixart_config": config_to_tensor(config)}, path)


def write_t5(path: Path) -> None:
    """A tiny T5 whose file says of what size it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {**SIZES, "vocab_size": VOCAB_SIZE, "feed_forward_proj": "gated-gelu"}
    save_file(weights_of(make_t5()), path, metadata={"t5_config": json.dumps(fields)})


def write_lora(path: Path, config, prefix: str, seed=0, strength=0.5) -> None:
    """A LoRA of the attention, under diffusers' names behind `prefix`, without alpha."""
    generator = torch.Generator().manual_seed(seed)
    width, tensors = config.hidden_size, {}
    for index in range(config.depth):
        for name in ("attn1.to_q", "attn1.to_v", "attn2.to_k", "attn2.to_out.0"):
            key = f"{prefix}transformer_blocks.{index}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, width, generator=generator) * strength
            tensors[f"{key}.lora_B.weight"] = torch.randn(width, RANK, generator=generator) * strength
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
