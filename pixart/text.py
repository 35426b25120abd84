"""Captions: the official cleaning, T5 token ids, and masks for batches of unequal length."""

import html
import logging
import os
import re
import unicodedata
from collections.abc import Sequence
from html.entities import html5
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import torch
import torch.nn.functional as F

from .files.inside import check_file
from .quoting import shorten

PAD_ID = 0
EOS_ID = 1
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")  # the first that is there counts
# What transformers reads beside them.
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

CHARACTER_LIMIT = 30_000  # of a caption; the longest, of 4096 tokens, has about 18,000
TAG_LIMIT = 200  # of signs that may open a tag; the reader of HTML goes through the rest of the text for each
BRACKET_LIMIT = 32  # of brackets within each other; weights multiply, and 1.1 to the 32nd is 21

_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    r"\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0\uFE31\uFE32"
    r"\uFE58\uFE63\uFF0D"
)


def _compile(rules: list[tuple[str, str]]) -> list[tuple[re.Pattern, str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


_SCHEMES = tuple(re.compile(rf"\b{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])") for scheme in ("https?", "www"))
_HOST_LETTERS = re.compile(r"[a-zA-Z0-9.\-]+")
_WORD_EDGE = re.compile(r"\b")
_TOP_DOMAIN = re.compile(r"[.](?:com|co|ru|net|org|edu|gov|it)")
_REST_OF_LINK = re.compile(r"[\w/-]*\b/?(?!@)")
# The rules are applied in this order; each list ends where something other than a substitution follows. None takes time
# that grows faster than the text: a rule that begins with a repeated sign may begin at the first of them alone.
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
        (rf"(?<!\S)\S+\.(?:{_FILE_TYPES})", ""),
        ("[\"']{2,}", '"'),
        (r"\.{2,}", " "),
        (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
        (r"(?<!\s)\s+\.\s+", " "),
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
        (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),
        (r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b", ""),  # sizes; the second letter is the Cyrillic one
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
        self.handle_data(_unescape(f"&#{name};"))

    def handle_entityref(self, name):
        self.handle_data(html5.get(f"{name};", f"&{name}"))

    def unknown_decl(self, data):
        if data.upper().startswith("CDATA["):
            self.parts.append(data[len("CDATA[") :])


def _unescape(text: str) -> str:
    try:
        return html.unescape(text)
    except ValueError:  # Python takes no number of thousands of digits; to HTML it is no letter
        return html.unescape(re.sub(r"&#[0-9]{1000,};?", "\N{REPLACEMENT CHARACTER}", text))


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


def _find_host(text: str, start: int) -> tuple[int, int] | None:
    r"""Where re.compile(r"\b[a-zA-Z0-9.\-]+[.](?:com|...)[\w/-]*\b/?(?!@)").search(text, start) finds its match.

    That expression would go through a long row of such letters again from each of them. From the first with an edge
    of a word before it all is found that is found from those behind it.
    """
    while letters := _HOST_LETTERS.search(text, start):
        edge = _WORD_EDGE.search(text, letters.start(), letters.end())
        domains = _TOP_DOMAIN.finditer(text, edge.start() + 1, letters.end()) if edge else ()
        for domain in reversed(list(domains)):
            rest = _REST_OF_LINK.match(text, domain.end())
            if rest:
                return edge.start(), rest.end()
        start = letters.end()
    return None


def _remove_links(scheme: re.Pattern, text: str) -> str:
    """Without names of hosts, and without what a scheme matches."""
    kept, place, host = [], 0, _find_host(text, 0)
    begun = scheme.search(text)
    while begun or host:
        first, end = min(filter(None, (begun and begun.span(), host)), key=lambda span: span[0])
        kept.append(text[place:first])
        place = end
        if begun and begun.start() < place:
            begun = scheme.search(text, place)
        if host and host[0] < place:
            host = _find_host(text, place)
    return "".join([*kept, text[place:]])


def limit_text(text: str, *, cleaned: bool = False) -> tuple[str, str]:
    """A caption within what can be read in a moment, and a notice of what was cut; empty where it is whole.

    That is CHARACTER_LIMIT characters, many times what a caption's tokens can hold; if it is to be cleaned, also
    TAG_LIMIT signs that open a tag of HTML.
    """
    end = CHARACTER_LIMIT
    if cleaned:
        sign = next(islice(re.finditer("<", text[:end]), TAG_LIMIT, None), None)
        end = sign.start() if sign else end
    if len(text) <= end:
        return text, ""
    return text[:end], f"Read are the first {end} of {len(text)} characters; the rest was cut."


def check_brackets(text: str) -> None:
    """Raises ValueError for more than BRACKET_LIMIT round brackets within each other, which weights would be.

    ComfyUI's reader of prompt weights calls itself for each, and goes through all that is in it.
    """
    heights, deepest = [], 0  # of the brackets that are open: how deep those in them are that were closed
    for bracket in re.findall(r"\\[()]|[()]", text):
        if bracket == "(":
            heights.append(0)
        elif bracket == ")" and heights:
            height = heights.pop() + 1
            deepest = max(deepest, height)
            if heights:
                heights[-1] = max(heights[-1], height)
    if deepest > BRACKET_LIMIT:
        raise ValueError(
            f"Brackets too deep: got {deepest} within each other in {shorten(text)}, expected at most {BRACKET_LIMIT}. "
            f"Write a weight as (word:1.3), and \\( and \\) for brackets that are part of the text."
        )


def clean_caption(text: str) -> str:
    """One pass of the caption cleaning that PixArt-alpha was trained with: no URLs, HTML, codes or odd signs.

    The originals apply it twice; clean_prompt does so. Without the package ftfy, mojibake is not repaired. A text of
    more than CHARACTER_LIMIT characters or TAG_LIMIT tags is cut, see limit_text.
    Source: PixArt-alpha, diffusion/model/t5.py, T5Embedder.clean_caption.
    """
    text, cut = limit_text(str(text), cleaned=True)
    if cut:
        logging.warning("Caption cleaning: %s", cut)
    text = limit_text(unquote_plus(text).strip().lower(), cleaned=True)[0]  # %3C is a < too
    text = text.replace("<person>", "person")
    for scheme in _SCHEMES:
        text = _remove_links(scheme, text)
    text = _strip_html(text)
    text = _substitute(_AFTER_HTML, text)
    if len(re.findall("[-_]", text)) > 3:  # this-is-a-file-name
        text = re.sub("[-_]", " ", text)
    text = _unescape(_unescape(_fix_text(text))).strip()
    return _substitute(_AFTER_FIX, text).strip()


def clean_prompt(text: str) -> str:
    """clean_caption twice, as PixArt-alpha and diffusers prepare every prompt."""
    return clean_caption(clean_caption(text))


def load_tokenizer(folder: str | Path) -> Any:
    """The T5 tokenizer of a folder: spiece.model by sentencepiece, else tokenizer.json by transformers.

    Raises FileNotFoundError when the folder has neither, ValueError for a link out of it or a file beyond its limit.
    """
    file = tokenizer_file(folder)
    for path in map(Path(folder).joinpath, (file.name, *_TOKENIZER_SETTINGS)):
        if path == file or os.path.lexists(path):
            check_file(path, Path(folder))
    if file.name == "spiece.model":
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    from transformers import T5TokenizerFast

    return T5TokenizerFast.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


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


def count_tokens(text: str, tokenizer: Any) -> int:
    """How many tokens a caption has before any is cut, the end token among them."""
    return len(_encode(limit_text(text)[0], tokenizer)) + 1


def tokenize(prompts: str | Sequence[str], tokenizer: Any, caption_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of captions, cut or padded to caption_length; the last kept token is always the end token.

    tokenizer: a transformers T5 tokenizer or a sentencepiece processor (see load_tokenizer).
    Returns ids (B, caption_length) long and mask (B, caption_length) bool, True = keep.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    ids = torch.full((len(prompts), caption_length), PAD_ID)
    mask = torch.zeros(len(prompts), caption_length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        text, cut = limit_text(prompt)
        if cut:
            logging.warning("Caption %d: %s", row + 1, cut)
        kept, _ = truncate([*_encode(text, tokenizer), EOS_ID], caption_length)
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
