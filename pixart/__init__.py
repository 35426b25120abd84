"""PixArt as a self-contained model package: no ComfyUI in it, and nothing loaded from the network."""

from .config import CONFIGS, PixArtConfig
from .transformer import PixArt

__all__ = ["CONFIGS", "PixArt", "PixArtConfig"]
