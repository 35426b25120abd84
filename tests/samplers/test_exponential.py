"""The weights of SA-Solver and DPM-Solver++ against integrals computed with 60 digits."""

import mpmath
import pytest

from pixart_pack.samplers.exponential import adams_weights, lagrange_coefficients, moments

STEPS = [1e-14, 1e-9, 1e-5, 1e-2, 0.3, 0.999, 1.0, 1.001, 3.7, 20.0, 300.0]


@pytest.fixture(autouse=True)
def sixty_digits():
    with mpmath.workdps(60):
        yield


def exact_moment(z, k):
    """z * integral_0^1 e^(-z (1 - u)) u^k du, as z k! times the confluent function it is."""
    z = mpmath.mpf(z)
    return z / (k + 1) * mpmath.hyp1f1(1, k + 2, -z)


def exact_weight(nodes, i, z):
    """The integral of the i-th Lagrange basis polynomial under the exponential."""
    nodes = [mpmath.mpf(node) for node in nodes]
    coefficients = [mpmath.mpf(1)]
    for j, node in enumerate(nodes):
        if j != i:
            shifted = [mpmath.mpf(0), *coefficients]
            scaled = [node * c for c in coefficients] + [mpmath.mpf(0)]
            coefficients = [(a - b) / (nodes[i] - node) for a, b in zip(shifted, scaled, strict=True)]
    return mpmath.fsum(c * exact_moment(z, k) for k, c in enumerate(coefficients))


def test_the_exact_moment_is_the_integral():
    for k in range(4):
        z = mpmath.mpf("0.7")
        integral = mpmath.quad(lambda u, z=z, k=k: z * mpmath.exp(-z * (1 - u)) * u**k, [0, 1])
        assert abs(exact_moment(z, k) - integral) < mpmath.mpf(10) ** -50


@pytest.mark.parametrize("z", STEPS)
def test_moments(z):
    for k, moment in enumerate(moments(z, 4)):
        assert abs(moment / exact_moment(z, k) - 1) < 1e-14


@pytest.mark.parametrize("z", STEPS)
@pytest.mark.parametrize(
    "nodes",
    [
        [0.0],
        [0.0, -1.0],
        [0.0, -0.6, -1.5],
        [0.0, -1.1, -2.3, -3.2],
        [0.0, -1e-4, -2e-4, -3e-4],
        [0.0, -1e3, -2e3, -4e3],
        [1.0],
        [1.0, 0.0],
        [1.0, 0.0, -0.8],
        [1.0, 0.0, -1.0, -2.2],
        [1.0, 0.0, -1e-3, -3e-3],
    ],
    ids=str,
)
def test_weights(nodes, z):
    computed = adams_weights(nodes, moments(z, len(nodes)))
    for i, weight in enumerate(computed):
        assert abs(weight / exact_weight(nodes, i, z) - 1) < 1e-11


def test_basis_is_one_at_its_node_and_zero_at_the_others():
    nodes = [1.0, 0.0, -0.7, -1.9]
    for i in range(4):
        coefficients = lagrange_coefficients(nodes, i)
        values = [sum(c * node**k for k, c in enumerate(coefficients)) for node in nodes]
        assert values == pytest.approx([float(i == j) for j in range(4)], abs=1e-12)
