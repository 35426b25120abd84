"""The demo's T5 encoder while it is trained: the words of its captions, and one row for all other words."""

from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

from ..text import END, PAD, VOCABULARY, TextBatch
from .captions import WORDS, describe
from .scenes import MOST_ITEMS, random_scene

T5_FIELDS = {
    "d_model": 96,
    "d_ff": 192,
    "d_kv": 16,
    "num_heads": 6,
    "num_layers": 3,
    "vocab_size": VOCABULARY,
    "feed_forward_proj": "gated-gelu",
}
_FIRST_WORD = 3  # ids below are padding, end and unknown
FILLER_SHARE = 0.15  # of the captions, which get words that mean nothing


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that captions use."""
    rng = Random("words")
    captions = [describe(random_scene(rng, 1 + k % MOST_ITEMS), rng) for k in range(8000)]
    captions += [word for pairs in WORDS.values() for pair in pairs for word in pair]
    return sorted({PAD, END}.union(*tokenizer(captions).input_ids))


def add_fillers(batch: TextBatch, rng: Random) -> TextBatch:
    """Put one to three random words before a share of the captions, so that words never met mean nothing."""
    for row in range(len(batch.ids)):
        free = int((~batch.kept[row]).sum())
        if rng.random() >= FILLER_SHARE or not free or batch.ids[row, 0] in (PAD, END):
            continue
        count = min(rng.randint(1, 3), free)
        at = 0 if rng.random() < 0.5 else int(batch.kept[row].sum()) - 1  # before the end
        words = torch.tensor([rng.randrange(_FIRST_WORD, VOCABULARY) for _ in range(count)])
        ids = batch.ids[row]
        batch.ids[row] = torch.cat([ids[:at], words, ids[at:-count]])
        for mask in (batch.attended, batch.kept):
            mask[row] = torch.cat([torch.ones(count, dtype=mask.dtype), mask[row, :-count]])
    return batch


class TrainedText(nn.Module):
    """The encoder with the rows of its embedding that captions use kept apart, and a last one for all others.

    The whole table would be nearly all of an optimiser step's cost, for rows without a gradient.
    """

    def __init__(self, used: list[int]):
        super().__init__()
        self.encoder = T5EncoderModel(T5Config(**T5_FIELDS, dropout_rate=0.0))
        table = self.encoder.shared.weight.requires_grad_(False)
        self.words = nn.Parameter(torch.cat([table[used], torch.zeros(1, table.shape[1])]))
        self.register_buffer("used", torch.tensor(used))
        places = torch.full((VOCABULARY,), len(used))
        places[used] = torch.arange(len(used))
        self.register_buffer("places", places)

    def forward(self, ids: Tensor, attended: Tensor) -> Tensor:
        """ids, attended: (B, L). Returns (B, L, d_model)."""
        embedded = F.embedding(self.places[ids], self.words)
        return self.encoder(inputs_embeds=embedded, attention_mask=attended).last_hidden_state

    @torch.no_grad()
    def fill_table(self) -> T5EncoderModel:
        """Write the trained rows back; return the whole encoder."""
        self.encoder.shared.weight.copy_(self.words[self.places])
        return self.encoder
