"""Weights of exponential Adams methods: exact integrals of a Lagrange interpolant under an exponential.

With u = (lambda - lambda_s) / h the weights of DPM-Solver++ and of SA-Solver are
z * integral_0^1 e^(-z (1 - u)) l_i(u) du with z = q h and q = 1 + tau^2.
Nothing depends on lambda itself, only on ratios of steps, so no large terms cancel, however small the step.
Sources: arXiv 2309.05019, equations 14 to 18; arXiv 2211.01095, section 4.
"""

import math

SERIES_BELOW = 1.0
SERIES_TERMS = 24


def moments(z, count):
    """z * integral_0^1 e^(-z (1 - u)) u^k du for k = 0 .. count - 1, to float64's relative accuracy for every z > 0.

    z may be infinite: then all are 1.
    """
    if z < SERIES_BELOW:
        return [_moment_series(z, k) for k in range(count)]
    values = [-math.expm1(-z)]
    for k in range(1, count):
        values.append(1.0 - k / z * values[-1])
    return values


def _moment_series(z, k):
    """The same as a power series, z k! sum_j (-z)^j / (k + 1 + j)!, where the recurrence would cancel."""
    term = total = z / (k + 1)
    for j in range(1, SERIES_TERMS):
        term *= -z / (k + 1 + j)
        total += term
    return total


def lagrange_coefficients(nodes, i):
    """The i-th Lagrange basis polynomial over the nodes, lowest power first."""
    coefficients = [1.0]
    for j, node in enumerate(nodes):
        if j == i:
            continue
        scale = 1.0 / (nodes[i] - node)
        raised = [0.0, *coefficients]
        lowered = [node * c for c in coefficients] + [0.0]
        coefficients = [scale * (a - b) for a, b in zip(raised, lowered, strict=True)]
    return coefficients


def adams_weights(nodes, integrals):
    """The weight of the model output at each node.

    nodes: in units of the step, source at 0 and target at 1. integrals: `moments`, one per node.
    """
    bases = (lagrange_coefficients(nodes, i) for i in range(len(nodes)))
    return [math.fsum(c * m for c, m in zip(basis, integrals, strict=True)) for basis in bases]
