"""The nodes' small pictures."""

import pytest

from pixart_pack.pixart.drawing.diagrams import _LINE, SIZE_PX, draw_bins, draw_schedule
from pixart_pack.pixart.resolution import ASPECT_RATIOS
from pixart_pack.samplers.schedules import schedule_sigmas


def box_of(image, colour, tolerance=24):
    near = image.point(lambda value: value).convert("RGB")
    points = [
        (x, y)
        for y in range(near.height)
        for x in range(near.width)
        if all(abs(a - b) <= tolerance for a, b in zip(near.getpixel((x, y)), colour, strict=True))
    ]
    (left, *_, right), (top, *_, bottom) = (sorted(values) for values in zip(*points, strict=True))
    return left, top, right, bottom


@pytest.mark.parametrize("levels", [schedule_sigmas("uniform", 20).tolist(), [5.0, 0.0], [0.02, 0.015, 0.0]])
def test_the_schedule_goes_from_the_first_level_down_to_the_last(levels):
    image = draw_schedule(levels)
    left, top, right, bottom = box_of(image, _LINE)
    assert image.size == SIZE_PX
    assert left < 60 and right > SIZE_PX[0] - 60 and bottom - top > 8


def test_two_schedules_look_different():
    uniform, karras = (draw_schedule(schedule_sigmas(name, 20).tolist()) for name in ("uniform", "karras"))
    assert uniform.tobytes() != karras.tobytes()


@pytest.mark.parametrize("base_px", list(ASPECT_RATIOS))
@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
def test_the_chosen_size_has_its_own_ratio(base_px, ratio):
    left, top, right, bottom = box_of(draw_bins(base_px, ratio), _LINE)
    assert (bottom - top) / (right - left) == pytest.approx(ratio, rel=0.2)
