"""Captions: the official cleaning, T5 token ids, and masks for batches of unequal length."""

import html
import logging
import re
import unicodedata
from collections.abc import Sequence
from html.entities import html5
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import torch
import torch.nn.functional as F

PAD_ID = 0
EOS_ID = 1
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")  # the first that is there counts

_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_HOST = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = (
    r"\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0\uFE31\uFE32"
    r"\uFE58\uFE63\uFF0D"
)


def _compile(rules: list[tuple[str, str]]) -> list[tuple[re.Pattern, str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


# The rules are applied in this order; each list ends where something other than a substitution follows.
_BEFORE_HTML = _compile(
    [
        ("<person>", "person"),
        (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", ""),
        (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", ""),
    ]
)
_AFTER_HTML = _compile(
    [
        (r"@\w+\b", ""),  # account names
        (r"[\u31C0-\u9FFF]+", ""),  # Chinese, Japanese and Korean ideographs and signs
        (f"[{_DASHES}]+", "-"),
        ("[`´«»“”¨]", '"'),
        ("[‘’]", "'"),
        ("&quot;?", ""),
        ("&amp", ""),
        (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
        (r"\d:\d\d\s+$", ""),  # article numbers
        (r"\\n", " "),
        (r"#\d{1,3}\b", ""),
        (r"#\d{5,}\b", ""),
        (r"\b\d{6,}\b", ""),
        (rf"\S+\.(?:{_FILE_TYPES})", ""),
        ("[\"']{2,}", '"'),
        (r"\.{2,}", " "),
        (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
        (r"\s+\.\s+", " "),
    ]
)
_AFTER_FIX = _compile(
    [
        (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # product codes
        (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
        (r"\b\d+[a-zA-Z]+\d+\b", ""),
        (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
        (r"(?:free\s)?download(?:\sfree)?", ""),
        (r"\bclick\b\s(?:for|on)\s\w+", ""),
        (rf"\b(?:{_FILE_TYPES})(?:\simages?)?", ""),
        (r"\bpage\s+\d+\b", ""),
        (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
        (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second letter is the Cyrillic one
        (r"\b\s+:\s+", ": "),
        (r"(\D[,./])\b", r"\1 "),
        (r"\s+", " "),
        (r"^[\"']([\w\W]+)[\"']$", r"\1"),
        (r"^['_,\-:;]", ""),
        (r"['_,\-:+]$", ""),
        (r"^\.\S+$", ""),
    ]
)


class _TextOfHTML(HTMLParser):
    """The text which BeautifulSoup(markup, "html.parser").text gives, as a list of its parts."""

    VOID = frozenset("area base br col embed hr img input keygen link menuitem meta param source track wbr".split())
    VOID |= frozenset("basefont bgsound command frame image isindex nextid spacer".split())
    HIDDEN = frozenset({"rp", "rt", "script", "style", "template"})

    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self.open_tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open_tags:
            while self.open_tags.pop() != tag:
                pass

    def handle_data(self, data):
        if self.HIDDEN.isdisjoint(self.open_tags):
            self.parts.append(data)

    def handle_charref(self, name):
        self.handle_data(html.unescape(f"&#{name};"))

    def handle_entityref(self, name):
        self.handle_data(html5.get(f"{name};", f"&{name}"))

    def unknown_decl(self, data):
        if data.upper().startswith("CDATA["):
            self.parts.append(data[len("CDATA[") :])


def _strip_html(text: str) -> str:
    parser = _TextOfHTML()
    try:
        parser.feed(text)
        parser.close()
    except AssertionError:  # what html.parser raises for an unknown "<![" section
        return text
    return "".join(parser.parts)


_CONTROL = dict.fromkeys(
    [*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
)
_FULL_WIDTH = {code: unicodedata.normalize("NFKC", chr(code)) for code in [0x3000, *range(0xFF01, 0xFFF0)]}
_LIGATURES = {code: unicodedata.normalize("NFKC", chr(code)) for code in [0x132, 0x133, *range(0xFB00, 0xFB07)]}
_QUOTES = {0x2BC: "'", **dict.fromkeys(range(0x2018, 0x201C), "'"), **dict.fromkeys(range(0x201C, 0x2020), '"')}
_SIMPLE_FIXES = {**_CONTROL, **_FULL_WIDTH, **_LIGATURES, **_QUOTES}


def _fix_text(text: str) -> str:
    try:
        import ftfy
    except ImportError:
        logging.debug("Caption cleaning without the package ftfy: wrongly decoded letters (mojibake) stay as they are.")
        return unicodedata.normalize("NFC", text.translate(_SIMPLE_FIXES))
    return ftfy.fix_text(text)


def _substitute(rules: list[tuple[re.Pattern, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def clean_caption(text: str) -> str:
    """One pass of the caption cleaning that PixArt-alpha was trained with: no URLs, HTML, codes or odd signs.

    The originals apply it twice; clean_prompt does so. Without the package ftfy, mojibake is not repaired.
    Source: PixArt-alpha, diffusion/model/t5.py, T5Embedder.clean_caption.
    """
    text = unquote_plus(str(text)).strip().lower()
    text = _substitute(_BEFORE_HTML, text)
    text = _strip_html(text)
    text = _substitute(_AFTER_HTML, text)
    if len(re.findall("[-_]", text)) > 3:  # this-is-a-file-name
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(_fix_text(text))).strip()
    return _substitute(_AFTER_FIX, text).strip()


def clean_prompt(text: str) -> str:
    """clean_caption twice, as PixArt-alpha and diffusers prepare every prompt."""
    return clean_caption(clean_caption(text))


def load_tokenizer(folder: str | Path) -> Any:
    """The T5 tokenizer of a folder: spiece.model by sentencepiece, else tokenizer.json by transformers.

    Raises FileNotFoundError when the folder has neither.
    """
    file = tokenizer_file(folder)
    if file.name == "spiece.model":
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    from transformers import T5TokenizerFast

    return T5TokenizerFast.from_pretrained(str(folder), local_files_only=True)


def tokenizer_file(folder: str | Path) -> Path:
    """The file that load_tokenizer reads in a folder. Raises FileNotFoundError when there is none."""
    files = [Path(folder, name) for name in TOKENIZER_FILES if Path(folder, name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"No T5 tokenizer: got the folder {folder}, expected {' or '.join(TOKENIZER_FILES)} in it. "
            f"Choose the built-in tokenizer, or download the model's tokenizer folder."
        )
    return files[0]


def _encode(text: str, tokenizer: Any) -> list[int]:
    ids = list(tokenizer(text)["input_ids"] if callable(tokenizer) else tokenizer.encode(text))
    return ids[:-1] if ids[-1:] == [EOS_ID] else ids


def tokenize(prompts: str | Sequence[str], tokenizer: Any, caption_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of captions, cut or padded to caption_length; the last kept token is always the end token.

    tokenizer: a transformers T5 tokenizer or a sentencepiece processor (see load_tokenizer).
    Returns ids (B, caption_length) long and mask (B, caption_length) bool, True = keep.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    ids = torch.full((len(prompts), caption_length), PAD_ID)
    mask = torch.zeros(len(prompts), caption_length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        kept, _ = truncate([*_encode(prompt, tokenizer), EOS_ID], caption_length)
        ids[row, : len(kept)] = torch.tensor(kept)
        mask[row, : len(kept)] = True
    return ids, mask


def truncate(tokens: Sequence, caption_length: int) -> tuple[list, list]:
    """Cut tokens, of which the last is the end token, to caption_length with the end token kept.

    Returns (kept, cut). Raises ValueError for a caption_length below 1.
    """
    if caption_length < 1:
        raise ValueError(
            f"Caption length out of range: got {caption_length}, expected at least 1. "
            f"Choose 120 for PixArt-alpha or 300 for PixArt-Sigma."
        )
    if len(tokens) <= caption_length:
        return list(tokens), []
    return [*tokens[: caption_length - 1], tokens[-1]], list(tokens[caption_length - 1 : -1])


def batch_captions(states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack captions of unequal length, padded with zeros to the longest only.

    states: B tensors (1, L_b, D). Returns (B, L, D) and its mask (B, L) bool, True = keep.
    """
    lengths = torch.tensor([caption.shape[1] for caption in states], device=states[0].device)
    longest = int(lengths.max())
    padded = torch.cat([F.pad(caption, (0, 0, 0, longest - caption.shape[1])) for caption in states])
    return padded, torch.arange(longest, device=lengths.device) < lengths[:, None]
