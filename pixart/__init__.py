"""PixArt as a self-contained model package: no ComfyUI in it, and nothing loaded from the network."""

from .config import CONFIGS, PixArtConfig

__all__ = ["CONFIGS", "PixArt", "PixArtConfig"]


def __getattr__(name: str):
    """The model, imported when it is asked for: it brings PyTorch, which takes seconds."""
    if name == "PixArt":
        from .transformer import PixArt

        return PixArt
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
