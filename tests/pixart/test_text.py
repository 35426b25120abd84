"""Caption cleaning, token ids and masks, against the originals' text and ids."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_pack.pixart.text import (
    _SCHEMES,
    BRACKET_LIMIT,
    CHARACTER_LIMIT,
    TAG_LIMIT,
    _remove_links,
    _strip_html,
    batch_captions,
    check_brackets,
    clean_caption,
    clean_prompt,
    limit_text,
    load_tokenizer,
    tokenize,
    truncate,
)
from pixart_pack.tests.goldens import load_golden
from pixart_pack.tests.spiece import write_spiece

TEXT, _ = load_golden("text")
CASES = TEXT["cases"]
MOJIBAKE = "mojibake: "


def name_of(case):
    return case["prompt"][:30]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_clean_caption(case):
    pytest.importorskip("ftfy")
    assert clean_caption(case["prompt"]) == case["clean_repo_once"]
    assert clean_prompt(case["prompt"]) == case["clean_repo"] == case["clean_diffusers"]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_clean_caption_without_ftfy(case, monkeypatch):
    """Only wrongly decoded letters need the package."""
    monkeypatch.setitem(sys.modules, "ftfy", None)
    expected = case["clean_repo"]
    if case["prompt"].startswith(MOJIBAKE):
        expected = expected.replace('"quotes"', "â€œquotesâ€\x9d")
    assert clean_prompt(case["prompt"]) == expected


MARKUP = """
<b> </b> <br> <br/> <p <div> </div> <script> </script> <style> </style> <template> </template> <rt> </rt> <!--c-->
<!DOCTYPE&#32;x> <![CDATA[y]]> <?x?> &amp; &lt; &copy; &copyx; &nope; &a &#65; &#150; < > & " a
"""
markup = st.lists(st.sampled_from([" ", *MARKUP.split()]))


@settings(deadline=None)
@given(markup.map("".join))
def test_html_text_equals_beautiful_soup(text):
    bs4 = pytest.importorskip("bs4")
    got, expected = _strip_html(text), bs4.BeautifulSoup(text, features="html.parser").text
    assert re.sub(r"\s+", " ", got) == re.sub(r"\s+", " ", expected)  # which the cleaning does later


def test_unknown_html_section_stays():
    assert _strip_html("a <![foo") == "a <![foo"


@pytest.mark.slow
@settings(deadline=None)
@given(st.text())
def test_clean_caption_takes_any_text(text):
    assert isinstance(clean_prompt(text), str)


HOST = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"  # the original's, slow and plain
link_parts = st.lists(st.sampled_from([*"a1.-_/é @x%", ".com", ".co", ".it", "http:", "https:/", "www:", "//", "http"]))


@settings(deadline=None)
@given(link_parts.map("".join), st.sampled_from([("https?", 0), ("www", 1)]))
def test_links_are_what_the_original_expression_finds(text, kind):
    scheme, index = kind
    original = re.compile(rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|{HOST})")
    assert _remove_links(_SCHEMES[index], text) == original.sub("", text)


# What one of the rules, or the reader of HTML, went through again from each of its letters.
SLOW = {
    "letters": "a",
    "hosts": "a.",
    "host without an end": "a.com-",
    "numbers": "1.",
    "spaces": "x" + " " * 1000,
    "accents": "é",
    "opened tags": "<a ",
    "encoded tags": "%3ca ",
    "attributes": "<a b='",
    "comments": "<!--",
    "opened elements": "<b>x",
    "entities": "&#1",
    "brackets": "(",
}


@pytest.mark.parametrize("name", SLOW)
def test_cleaning_takes_time_in_proportion_to_the_text(name):
    """Four times the text took sixteen times as long, and 40,000 characters up to a minute."""

    def seconds(count: int) -> float:
        text = (SLOW[name] * count)[:count]
        start = time.process_time()
        clean_prompt(text)
        return time.process_time() - start

    seconds(100)
    short, long = min(seconds(7_500) for _ in range(2)), min(seconds(30_000) for _ in range(2))
    assert long < 9 * short + 0.05


@pytest.mark.parametrize("text", ["1" * 29_000 + "_", "a1a" + "1" * 29_000 + "é", "a.com" + "é" * 29_000 + "@"])
def test_cleaning_does_not_try_all_ways_to_part_a_row_of_signs(text):
    start = time.process_time()
    clean_prompt(text)
    assert time.process_time() - start < 1  # was 10 and more


def test_a_letter_by_a_number_of_thousands_of_digits():
    assert clean_prompt("a &#" + "1" * 5000 + "; b") == "a \N{REPLACEMENT CHARACTER} b"


def test_a_caption_is_cut_where_no_token_counts_any_more():
    whole = "x" * CHARACTER_LIMIT
    assert limit_text(whole) == (whole, "")
    assert limit_text(whole + "y") == (whole, "Read are the first 30000 of 30001 characters; the rest was cut.")
    tags = "<b>" * TAG_LIMIT
    assert limit_text(tags, cleaned=True) == (tags, "")
    assert limit_text(tags + "<b>", cleaned=True)[0] == tags and limit_text(tags + "<b>") == (tags + "<b>", "")


def test_brackets_within_each_other_are_bounded():
    deep = "(" * BRACKET_LIMIT + "x" + ")" * BRACKET_LIMIT
    for text in (deep, deep * 100, "(" * 1000, ")" * 1000 + "(" * 1000, "()" * 1000, r"\(" * 100 + r"\)" * 100):
        check_brackets(text)
    for text in (f"({deep})", "a (b" + deep + "c) d", "(" * 100_000 + ")" * 100_000):
        with pytest.raises(ValueError, match="Brackets too deep: got .* expected at most 32") as caught:
            check_brackets(text)
        assert len(str(caught.value)) < 400


@pytest.fixture(scope="module")
def host_tokenizer_folder():
    host = os.environ.get("PIXART_COMFYUI")
    folder = Path(host or "") / "comfy" / "text_encoders" / "t5_tokenizer"
    if not host or not folder.is_dir():
        pytest.skip("the T5 vocabulary is in ComfyUI: set PIXART_COMFYUI to its folder")
    return folder


@pytest.fixture(scope="module")
def sentencepiece_folder(host_tokenizer_folder, tmp_path_factory):
    """The same vocabulary as a spiece.model."""
    folder = tmp_path_factory.mktemp("spiece")
    write_spiece(host_tokenizer_folder / "tokenizer.json", folder / "spiece.model")
    return folder


@pytest.mark.parametrize("source", ["host_tokenizer_folder", "sentencepiece_folder"])
@pytest.mark.parametrize("length", [120, 300])
def test_token_ids(request, source, length):
    tokenizer = load_tokenizer(request.getfixturevalue(source))
    for kind, field in (
        ("tokens_raw", "prompt"),
        ("tokens_clean", "clean_repo"),
        ("tokens_noclean", "noclean_diffusers"),
    ):
        ids, mask = tokenize([case[field] for case in CASES], tokenizer, length)
        assert ids.shape == mask.shape == (len(CASES), length) and mask.dtype == torch.bool
        for row, case in enumerate(CASES):
            expected = case[kind][str(length)]
            assert ids[row, mask[row]].tolist() == expected["ids_valid"], case[field]
            assert mask[row].sum() == expected["n_valid"] and not ids[row, ~mask[row]].any()


@pytest.fixture(scope="module")
def tiny_sentencepiece(tmp_path_factory):
    """A real sentencepiece model with T5's special ids, trained on a sentence."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tiny")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a small cat on a red mat", "two dogs under the old tree"] * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=24,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder


def test_tokenize_with_sentencepiece(tiny_sentencepiece):
    tokenizer = load_tokenizer(tiny_sentencepiece)
    ids, mask = tokenize(["a cat", "", "two dogs under the old tree"], tokenizer, 8)
    words = tokenizer.encode("a cat")
    assert ids[0].tolist() == [*words, 1] + [0] * (7 - len(words))
    assert ids[1].tolist() == [1] + [0] * 7 and mask[1].sum() == 1
    assert ids[2].tolist() == tokenizer.encode("two dogs under the old tree")[:7] + [1] and mask[2].all()
    assert torch.equal(tokenize("a cat", tokenizer, 8)[0], ids[:1])


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected spiece.model or tokenizer.json"):
        load_tokenizer(tmp_path)


def test_truncate_keeps_the_end_token():
    tokens = [(5, 1.0), (6, 1.3), (7, 1.0), (1, 1.0)]
    assert truncate(tokens, 4) == (tokens, [])
    assert truncate(tokens, 3) == ([(5, 1.0), (6, 1.3), (1, 1.0)], [(7, 1.0)])
    assert truncate(tokens, 1) == ([(1, 1.0)], tokens[:3])
    with pytest.raises(ValueError, match="got 0, expected at least 1"):
        truncate(tokens, 0)


def test_batch_captions_pads_to_the_longest_only():
    short, long = torch.ones(1, 2, 3), torch.full((1, 5, 3), 2.0)
    states, mask = batch_captions([short, long])
    assert states.shape == (2, 5, 3)
    assert mask.tolist() == [[True, True, False, False, False], [True] * 5]
    assert torch.equal(states[0, :2], short[0]) and not states[0, 2:].any() and torch.equal(states[1:], long)
