"""T5 outside ComfyUI, by transformers: captions to states."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..quoting import shorten
from ..text import TOKENIZER_FILES, load_tokenizer, tokenize
from ..weights.quantised.modules import replace_packed
from ..weights.t5 import read_encoder


class TextEncoder:
    """A T5 v1.1 encoder with its tokenizer."""

    def __init__(self, network, tokenizer):
        self.network, self.tokenizer = network, tokenizer

    def __call__(self, captions: Sequence[str], caption_length: int) -> list[torch.Tensor]:
        """The states of each caption, (L, D), as long as its tokens; longer ones are cut to caption_length."""
        return [self._encode(caption, caption_length) for caption in captions]

    def _encode(self, caption: str, caption_length: int) -> torch.Tensor:
        ids, mask = tokenize(caption, self.tokenizer, caption_length)
        ids = ids[:, : int(mask.sum())].to(self.network.device)  # unpadded: equal to a padded run under its mask
        with torch.no_grad():
            return self.network(input_ids=ids).last_hidden_state[0]


def load_text_encoder(
    path: str | Path, tokenizer: str | Path | None = None, dtype: torch.dtype = torch.float32, device="cpu"
) -> TextEncoder:
    """The T5 of a file or folder. tokenizer: its folder; None looks beside the encoder and in COMFYUI_PATH.

    Raises FileNotFoundError when there is no file or tokenizer, ValueError for a file of another kind.
    """
    path = Path(path)
    network = read_network(path, dtype, device)
    return TextEncoder(network, load_tokenizer(tokenizer or find_tokenizer(path)))


def read_network(path: Path, dtype: torch.dtype = torch.float32, device="cpu"):
    """The T5EncoderModel of a file or folder. GGUF's weights stay in their blocks. Raises as `load_text_encoder`."""
    from transformers import T5Config, T5EncoderModel

    weights, sizes = read_encoder(path, dtype, packed=True)
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    with torch.device("meta"):
        network = T5EncoderModel(config)
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    weights = {name: weights[name] for name in network.state_dict()}
    network.load_state_dict(replace_packed(network, weights, device, dtype), assign=True)
    return network.eval().requires_grad_(False)


def find_tokenizer(path: Path) -> Path:
    """The folder of a text encoder's tokenizer: beside it, in its pipeline, or in the ComfyUI of the environment.

    Raises FileNotFoundError when there is none.
    """
    folder = path if path.is_dir() else path.parent
    places = [folder, folder.parent / "tokenizer"]
    if os.environ.get("COMFYUI_PATH"):
        places.append(Path(os.environ["COMFYUI_PATH"], "comfy", "text_encoders", "t5_tokenizer"))
    for place in places:
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            return place
    raise FileNotFoundError(
        f"No T5 tokenizer: got none beside {shorten(path.name)}, expected {' or '.join(TOKENIZER_FILES)}. Name its "
        f"folder with --tokenizer, or set COMFYUI_PATH to a ComfyUI, which holds one."
    )
