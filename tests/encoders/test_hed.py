"""The HED network against its reference cases, and on pictures of every kind."""

import numpy as np
import pytest
import torch

from pixart_pack.pixart.encoders.hed import HED, LEAST_PX, WIDTHS, detect_edges, make_hed
from pixart_pack.tests.goldens import load_golden, take

# The cases' own noise is 4e-6 at most; the order of the sums differs between libraries.
ATOL = 2e-5


def formula_weights(case):
    """The weights of a case that stores none: drawn by the formula in its description."""
    draw, weights = np.random.RandomState(case["weight_seed"]), {}
    for name, shape in case["state_dict_order"]:
        z = draw.standard_normal(shape)
        if name == "norm":
            z = 110 + 10 * z
        elif name.endswith("bias"):
            z = 0.5 * z
        elif "projection" in name:
            z = z * 0.02 / np.sqrt(shape[1])
        else:
            z = z * np.sqrt(2 / (shape[1] * 9))
        weights[name] = torch.from_numpy(z.astype(np.float32))
    for name, sums in case["weight_checksums"].items():
        assert weights[name].double().sum().item() == pytest.approx(sums["sum"], abs=1e-6)
    return weights


@pytest.mark.parametrize("name", ["hed_narrow", "hed_narrow_odd", "hed_full_formula_weights"])
def test_reference(name):
    case, tensors = load_golden(name)
    weights = take(tensors, "weights") or formula_weights(case)
    assert [key for key, _ in case["state_dict_order"]] == list(HED(device="meta").state_dict())
    network = make_hed(weights, name)
    images = tensors["input.image"]
    with torch.no_grad():
        for number, logits in enumerate(network(images * 255), 1):
            torch.testing.assert_close(logits, tensors[f"output.side{number}"], atol=ATOL, rtol=1e-5)
        edges = detect_edges(network, images)
    torch.testing.assert_close(edges, tensors["output.edge"], atol=ATOL, rtol=0)
    torch.testing.assert_close(edges, tensors["output_f64.edge"], atol=ATOL, rtol=0)
    for strength in (1.0, 0.6):
        expected = tensors.get(f"output.vae_input_strength{strength}")
        if expected is not None:  # what the VAE gets of an IMAGE is 2 x - 1
            torch.testing.assert_close((edges * strength).expand(-1, 3, -1, -1) * 2 - 1, expected, atol=ATOL, rtol=0)


def test_published_widths():
    assert {key: tuple(value.shape) for key, value in HED(device="meta").state_dict().items()} == {
        key: tuple(shape) for key, shape in load_golden("hed_full_formula_weights")[0]["state_dict_order"]
    }
    assert len(WIDTHS) == 5


@pytest.fixture(scope="module")
def network():
    return make_hed(take(load_golden("hed_narrow")[1], "weights"), "narrow")


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (LEAST_PX, LEAST_PX), (33, 47), (129, 16)])
def test_any_size(network, size):
    edges = detect_edges(network, torch.rand(3, 3, *size))
    assert edges.shape == (3, 1, *size) and edges.isfinite().all()
    assert edges.min() >= 0 and edges.max() <= 1


def test_a_batch_is_its_pictures(network):
    images = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    together = detect_edges(network, images)
    alone = torch.cat([detect_edges(network, image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)  # convolutions sum in another order


def test_other_files_are_refused(network):
    weights = network.state_dict()
    with pytest.raises(ValueError, match="Not the HED edge detector: got lllite.weight in 'x.pth', expected norm"):
        make_hed({"lllite.weight": torch.zeros(1)}, "x.pth")
    with pytest.raises(ValueError, match="got no tensors in 'x.pth'"):
        make_hed({}, "x.pth")
    missing = {key: value for key, value in weights.items() if key != "block3.projection.weight"}
    with pytest.raises(ValueError, match="Damaged HED file: got .*block3.projection.weight.* in 'x.pth'"):
        make_hed(missing, "x.pth")
    with pytest.raises(ValueError, match="Damaged HED file: got .*block2.convs.1.weight.* in 'x.pth'"):
        make_hed({**weights, "block2.convs.1.weight": torch.zeros(1, 2, 3, 3)}, "x.pth")


def test_half_precision_files_are_computed_in_full(network):
    halves = {key: value.half() for key, value in network.state_dict().items()}
    assert {parameter.dtype for parameter in make_hed(halves, "half.pth").parameters()} == {torch.float32}
