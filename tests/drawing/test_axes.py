"""Axes and their combinations."""

import time

import pytest

from pixart_pack.pixart.commands.compare import parse_target
from pixart_pack.pixart.drawing.axes import HEADING_LIMIT, Axis, Grid, parse_axis
from pixart_pack.tests import hostile_texts


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("8, 14,20", (8, 14, 20)),
        ("3\n4.5\n", (3, 4.5)),
        ("euler, pixart_sa_solver", ("euler", "pixart_sa_solver")),
        ("a cat, sleeping\na dog, running", ("a cat, sleeping", "a dog, running")),
        ("'a cat, sleeping'", ("a cat, sleeping",)),
        ('true, False, "14"', (True, False, "14")),
        ("-1e-4", (-1e-4,)),
    ],
)
def test_values_are_read_by_line_or_comma_and_get_their_type(text, values):
    found = parse_axis("x", text).values
    assert found == values
    assert list(map(type, found)) == list(map(type, values))


def test_an_axis_needs_values():
    with pytest.raises(ValueError, match="Axis without values: got an empty text for 'steps'"):
        parse_axis("steps", " \n")


def test_cells_go_row_by_row_with_the_labels_beside_them():
    grid = Grid(Axis("steps", (8, 14)), Axis("cfg", (3.0, 4.5)))
    assert grid.cells() == [(8, 3.0), (14, 3.0), (8, 4.5), (14, 4.5)]
    assert grid.labels() == ["steps 8, cfg 3.0", "steps 14, cfg 3.0", "steps 8, cfg 4.5", "steps 14, cfg 4.5"]
    assert Grid(Axis("steps", (8, 14)), Axis("", (None,))).labels() == ["steps 8", "steps 14"]


def test_texts_of_a_workflow_speak_for_themselves():
    workflow = {"7": {"class_type": "KSampler", "inputs": {"steps": 20, "sampler_name": "euler"}}}
    assert parse_target("7.steps=8,14", workflow) == ("7", "steps", Axis("steps", (8, 14)))
    assert parse_target("7.sampler_name=euler,ddim", workflow)[2].headings() == ["euler", "ddim"]


def test_a_slip_of_the_keyboard_does_not_queue_hours_of_work():
    with pytest.raises(ValueError, match="got 441, expected at most 400"):
        Grid(Axis("", tuple(range(21))), Axis("", tuple(range(21))))


@pytest.mark.parametrize("name", ["commas", "lines"])
def test_more_values_than_cells_are_refused(name):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="Too many values: got 1000000 for 'x', expected at most 400"):
        parse_axis("x", hostile_texts.AXES[name])
    assert time.perf_counter() - start < 1


def test_a_long_value_stays_whole_and_its_heading_does_not():
    (value,) = parse_axis("x", hostile_texts.AXES["digits"]).values
    assert value == hostile_texts.AXES["digits"]
    headings = Axis("x", (value, "b")).headings()
    assert len(headings[0]) == HEADING_LIMIT + 3 and headings[1] == "x b"
