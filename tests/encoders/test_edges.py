"""Edges without a network, on drawn pictures where their place is known."""

import pytest
import torch

from pixart_pack.pixart.encoders.edges import canny_edges, soft_edges


def step_picture(left, right, size=64):
    """Two halves of one colour each: (1, 3, size, size), the border before column size / 2."""
    image = torch.empty(1, 3, size, size)
    image[..., : size // 2] = torch.tensor(left).view(1, 3, 1, 1)
    image[..., size // 2 :] = torch.tensor(right).view(1, 3, 1, 1)
    return image


def test_canny_draws_one_line():
    edges = canny_edges(step_picture((0.1, 0.1, 0.1), (0.9, 0.9, 0.9)))
    assert edges.shape == (1, 1, 64, 64) and edges.unique().tolist() == [0, 1]
    columns = edges[0, 0].sum(0).nonzero().flatten().tolist()
    assert columns in ([31], [32], [31, 32])


def test_canny_thresholds():
    faint = step_picture((0.4, 0.4, 0.4), (0.5, 0.5, 0.5))
    assert not canny_edges(faint).any() and canny_edges(faint, 0.1, 0.2).any()
    for thresholds in ((0.5, 0.4), (0, 0.4), (0.4, 1)):
        with pytest.raises(ValueError, match="Thresholds out of order: got"):
            canny_edges(faint, *thresholds)


def test_soft_edges_peak_at_the_step():
    edges = soft_edges(step_picture((0.1, 0.1, 0.1), (0.9, 0.9, 0.9)))
    assert edges.shape == (1, 1, 64, 64)
    row = edges[0, 0, 20]
    assert row.argmax() in (31, 32) and row.max() > 0.9
    assert row[20] > 0 and row[:10].max() < 1e-3 and row[54:].max() < 1e-3  # as wide as the largest scale, no wider
    torch.testing.assert_close(edges, edges.flip(-1), atol=1e-5, rtol=0)


def test_soft_edges_see_hue():
    """Of one brightness (by the usual weights), where canny sees nothing."""
    hues = step_picture((0.6, 0.2, 0.2), (0.2, 0.4037, 0.2))
    assert soft_edges(hues).max() > 0.5 and not canny_edges(hues).any()


def test_steps_of_one_height_look_alike():
    """The gain is the same in every direction and for every channel."""
    upright = soft_edges(step_picture((0.2, 0.5, 0.5), (0.5, 0.5, 0.5)))
    lying = soft_edges(step_picture((0.5, 0.5, 0.5), (0.5, 0.5, 0.2)).transpose(-1, -2))
    torch.testing.assert_close(upright.amax((-1, -2)), lying.amax((-1, -2)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("detect", [canny_edges, soft_edges])
def test_flat_pictures_have_no_edges(detect):
    assert detect(torch.full((2, 3, 37, 21), 0.7)).abs().max() < 1e-4


@pytest.mark.parametrize("detect", [canny_edges, soft_edges])
@pytest.mark.parametrize("size", [(3, 3), (5, 40), (33, 47)])
def test_any_size(detect, size):
    edges = detect(torch.rand(3, 3, *size))
    assert edges.shape == (3, 1, *size) and edges.min() >= 0 and edges.max() <= 1


def test_a_batch_is_its_pictures():
    images = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    for detect in (canny_edges, soft_edges):
        alone = torch.cat([detect(image[None]) for image in images])
        torch.testing.assert_close(detect(images), alone, atol=1e-6, rtol=0)
