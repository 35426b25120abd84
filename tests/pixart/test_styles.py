"""Style templates: the shipped ones, the user's own, and what a bad file says."""

import json
import time

import pytest

from pixart_pack.pixart.styles import PLAIN, SLOT, STYLES_FILE, Style, find_styles, load_styles
from pixart_pack.tests import hostile_texts


def write(folder, entries):
    path = folder / "user.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    return path


def test_the_shipped_styles_are_many_and_all_different():
    styles = load_styles([STYLES_FILE])
    assert len(styles) > 12
    assert len({style.apply("a cat") for style in styles.values()}) == len(styles)
    assert all(style.prompt.count(SLOT) == 1 for style in styles.values())
    assert all(style.negative for style in styles.values() if style is not PLAIN)


def test_a_style_surrounds_the_prompt_and_adds_to_the_negative(tmp_path):
    styles = load_styles(
        [write(tmp_path, [{"name": "Tin", "prompt": "tin toy of {prompt}, worn", "negative": "wood"}])]
    )
    assert styles["Tin"].apply(" a {fox} ", "text") == ("tin toy of a {fox}, worn", "text, wood")
    assert styles["Tin"].apply("a fox") == ("tin toy of a fox, worn", "wood")
    assert PLAIN.apply("a fox", "text") == ("a fox", "text")


def test_the_users_style_wins_over_one_of_the_same_name(tmp_path):
    styles = load_styles([STYLES_FILE, write(tmp_path, [{"name": "Macro", "prompt": "tiny {prompt}"}])])
    assert styles["Macro"].apply("fly") == ("tiny fly", "")


def test_a_file_that_is_not_there_is_no_error(tmp_path):
    assert list(load_styles([tmp_path / "user.json"])) == [PLAIN.name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON: got user.json"),
        ({"name": "x", "prompt": SLOT}, "no list: got dict"),
        ("[" * 100_000, "not JSON: got user.json with lists or objects more than 64 deep"),
        ([{"name": "x", "prompt": SLOT * 9}], "too many places for the prompt: got 9 as entry 1"),
        ([["x" * 10**6]], "entry 1 of user.json"),
        (["x"], "entry 1 of user.json"),
        ([{"name": "x", "prompt": SLOT}, {"name": "", "prompt": SLOT}], "entry 2 of user.json"),
        ([{"name": "x", "prompt": 3}], "Bad style"),
        ([{"name": "x", "prompt": "no place"}], r"without a place for the prompt: got 'no place'"),
    ],
)
def test_a_bad_file_is_named_with_the_entry(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_styles([write(tmp_path, content)])
    assert len(str(caught.value)) < 400


def test_styles_are_found_by_name_in_any_case_and_by_a_star():
    styles = load_styles([STYLES_FILE])
    assert [style.name for style in find_styles("macro, Anime\nno style", styles)] == ["Macro", "Anime", "No style"]
    assert find_styles(" * ", styles) == list(styles.values())
    with pytest.raises(ValueError, match="got Makro, expected names among No style"):
        find_styles("Makro", styles)


@pytest.mark.parametrize("name", hostile_texts.STYLES)
def test_names_that_mean_harm_take_a_moment(name):
    many = {f"style {number} {'x' * 1000}": Style("x", SLOT) for number in range(5000)}
    start = time.process_time()
    try:
        assert len(find_styles(hostile_texts.STYLES[name], many)) == 5000
    except ValueError as error:
        assert "Unknown style: got" in str(error) and len(str(error)) < 6000
    assert time.process_time() - start < 1
