"""What a training node says while it runs."""

import importlib
import re

import pytest
import torch

from pixart_pack.pixart.training.loop import Progress


@pytest.fixture(scope="module")
def view(comfy):
    return importlib.import_module("pixart_pack.nodes.host.training.view")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (250, "4 min 10 s"), (11_250, "3 h 07 min")]
)
def test_time_is_left_in_two_units(view, seconds, text):
    assert view.describe_seconds(seconds) == text


def test_two_lines_say_time_loss_speed_and_memory(view):
    progress = Progress(12, 1000, 0.2, 0.1234, 1e-4, 0.8, 790.4)
    assert view.describe_progress(progress, 4, "5.1/24 GB") == (
        "step 12 of 1000, 13 min 10 s left\nloss 0.1234, 5 pictures/s, 5.1/24 GB"
    )
    taken, total, unit = re.split("[/ ]", view.describe_memory(torch.device("cpu")))
    assert 0 < float(taken) <= float(total) and unit == "GB"
