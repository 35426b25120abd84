"""The demo's T5 encoder and how captions become its batches."""

import importlib.util
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel, T5TokenizerFast

VOCABULARY = 32128
PAD, END = 0, 1
# Only these fields of transformers' T5Config are the demo's own; they are written into the file's metadata too.
T5_FIELDS = {
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": VOCABULARY,
    "feed_forward_proj": "gated-gelu",
}


def make_text_encoder() -> T5EncoderModel:
    """A fresh encoder of transformers' own class, without dropout."""
    return T5EncoderModel(T5Config(**T5_FIELDS, dropout_rate=0.0))


def load_tokenizer(folder: Path | None = None) -> PreTrainedTokenizerBase:
    """The standard T5 tokenizer: from `folder`, else the one that an importable ComfyUI holds.

    Raises FileNotFoundError when there is neither.
    """
    if folder is None:
        spec = importlib.util.find_spec("comfy")
        places = (
            [Path(p, "text_encoders", "t5_tokenizer") for p in spec.submodule_search_locations or ()] if spec else []
        )
        folder = next((place for place in places if place.is_dir()), None)
    if folder is None or not Path(folder).is_dir():
        raise FileNotFoundError(
            f"T5 tokenizer missing: got {folder}, expected a folder with tokenizer.json. "
            f"Run this with ComfyUI importable, or give the folder."
        )
    return T5TokenizerFast.from_pretrained(folder)


class TextBatch:
    """Token ids, what the encoder attends to, and what the denoiser attends to: each (B, L)."""

    def __init__(self, ids: Tensor, attended: Tensor, kept: Tensor):
        self.ids, self.attended, self.kept = ids, attended, kept


def _null_row(rng: Random, longest: int) -> tuple[list[int], list[int], list[int]]:
    """One of the empty captions that a model meets: bare, padded under a prompt's mask, or all padding."""
    kind, length = rng.random(), rng.randint(8, max(longest, 8))
    if kind < 0.6:
        return [END], [1], [1]
    if kind < 0.8:
        return [END] + [PAD] * (length - 1), [1] + [0] * (length - 1), [1] * length
    return [PAD] * length, [1] * length, [1] * length


def make_text_batch(
    captions: list[str], tokenizer: PreTrainedTokenizerBase, rng: Random | None = None, null_share: float = 0.0
) -> TextBatch:
    """Tokenize captions; with `rng`, a share of them gives way to an empty caption."""
    tokens = [tuple(row) for row in tokenizer(captions).input_ids]
    longest = max(map(len, tokens))
    rows = []
    for row in tokens:
        if rng is not None and rng.random() < null_share:
            rows.append(_null_row(rng, longest))
        else:
            rows.append((list(row), [1] * len(row), [1] * len(row)))
    longest = max(len(row[0]) for row in rows)
    ids, attended, kept = (
        torch.tensor([part + [0] * (longest - len(part)) for part in parts]) for parts in zip(*rows, strict=True)
    )
    return TextBatch(ids, attended, kept.bool())


def encode_text(encoder: T5EncoderModel, batch: TextBatch) -> Tensor:
    """Run the encoder: (B, L, d_model)."""
    return encoder(input_ids=batch.ids, attention_mask=batch.attended).last_hidden_state


class TrainedText(nn.Module):
    """The encoder with the rows of its embedding that captions use kept apart.

    The whole table would be nearly all of an optimiser step's cost, for rows without a gradient.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, captions: list[str]):
        super().__init__()
        self.encoder = make_text_encoder()
        used = sorted({PAD, END}.union(*tokenizer(captions).input_ids))
        table = self.encoder.shared.weight.requires_grad_(False)
        self.words = nn.Parameter(table[used].clone())
        self.register_buffer("used", torch.tensor(used))
        places = torch.full((VOCABULARY,), -1)
        places[used] = torch.arange(len(used))
        self.register_buffer("places", places)

    def forward(self, batch: TextBatch) -> Tensor:
        """(B, L, d_model). Every id must be among the captions' own."""
        embedded = F.embedding(self.places[batch.ids], self.words)
        return self.encoder(inputs_embeds=embedded, attention_mask=batch.attended).last_hidden_state

    @torch.no_grad()
    def start_from(self, encoder: T5EncoderModel) -> None:
        """Take over a trained encoder's weights, of the rows too."""
        self.encoder.load_state_dict(encoder.state_dict())
        self.words.copy_(encoder.shared.weight[self.used])

    @torch.no_grad()
    def fill_table(self) -> T5EncoderModel:
        """Write the trained rows back; return the whole encoder."""
        self.encoder.shared.weight[self.used] = self.words
        return self.encoder
