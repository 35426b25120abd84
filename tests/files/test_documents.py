"""JSON and YAML of strangers: read within bounds, or refused in short words."""

import time

import pytest

from pixart_pack.pixart.files.documents import DEPTH_LIMIT, JSON_LIMIT, YAML_LIMIT, load_json, parse_json, parse_yaml
from pixart_pack.tests import hostile_texts


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


def test_plain_documents_are_read():
    assert (
        parse_json('{"a": [1, 2.5, null, true, "x"]}')
        == {"a": [1, 2.5, None, True, "x"]}
        == parse_json(b'{"a": [1,2.5, null, true, "x"]}')
    )
    assert parse_yaml("a: [1, 2.5, null, true]\nb:\n  - x: 'y'\n") == {"a": [1, 2.5, None, True], "b": [{"x": "y"}]}
    assert parse_yaml("") is None
    assert parse_json(deep(DEPTH_LIMIT)) and parse_yaml(deep(DEPTH_LIMIT))


@pytest.mark.parametrize("levels", [DEPTH_LIMIT + 1, 900, 100_000])
@pytest.mark.parametrize("form", [deep, lambda levels: '{"a":' * levels + "1" + "}" * levels])
def test_deep_json_is_refused(levels, form):
    with pytest.raises(ValueError, match=f"more than {DEPTH_LIMIT} deep"):
        parse_json(form(levels))


@pytest.mark.parametrize("text", [deep(DEPTH_LIMIT + 1), "- " * (DEPTH_LIMIT + 1) + "x", "? " * 5000, "{a: " * 4000])
def test_deep_yaml_is_refused(text):
    with pytest.raises(ValueError, match=f"more than {DEPTH_LIMIT} deep"):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1", "anchors and aliases such as &x and .x are not read.*line 1, column 4"),
        ("a: *x", "anchors and aliases"),
        (hostile_texts.nested_aliases(9), "anchors and aliases"),
        ("a: !!python/name:os.system", "tags are not read: 'tag:yaml.org,2002:python...e:os.system', line 1, column 4"),
        ("a: !!str 1", "tags are not read"),
        ("rank: 4\nrank: 8", "'rank' is given twice.*line 2, column 1"),
        ("a: {b: 1, b: 2}", "'b' is given twice"),
        ("a: 2001-99-99", "month"),
        (f"a: {'1' * 5000}", "digits"),
        ("a: [", "expected the node content"),
        ("a: b\n---\nc: d", "single document"),
        ("x" * (YAML_LIMIT + 1), f"20001 characters, and at most {YAML_LIMIT} are read"),
    ],
)
def test_other_yaml_is_refused_in_short_words(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text)
    assert len(str(caught.value)) <= 300 and str(caught.value).isprintable()


@pytest.mark.parametrize("name", hostile_texts.SETTINGS)
def test_hostile_yaml_takes_a_moment(name):
    start = time.process_time()
    try:
        parse_yaml(hostile_texts.SETTINGS[name])
    except ValueError as error:
        assert len(str(error)) <= 300
    assert time.process_time() - start < 2


@pytest.mark.parametrize("name", hostile_texts.JSON)
def test_hostile_json_takes_a_moment(name):
    start = time.process_time()
    try:
        parse_json(hostile_texts.JSON[name])
    except ValueError as error:
        assert len(str(error)) <= 300
    assert time.process_time() - start < 1


def test_files_are_measured_before_they_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert load_json(path) == {"a": 1}
    with path.open("wb") as file:
        file.truncate(JSON_LIMIT + 1)  # without taking room on the disk
    with pytest.raises(ValueError, match="67108865 characters, and at most 67108864"):
        load_json(path)
