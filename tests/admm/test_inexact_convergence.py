"""ELSA-L (arXiv 2510.01650, section 4): x-updates that are solved to a relative accuracy gamma, states in few bits."""

import pytest
import torch

from elsa_modifier.admm.projection import MaskStructure
from elsa_modifier.admm.state import ADMMState
from tests.admm.test_convergence import DIMENSION, KEEP, WeaklyConvex, stationarity_gap

# Of one entry, relative: half a unit in the last place; for int8 relative to the largest entry.
PRECISION = {"fp32": 2**-24, "bf16": 2**-9, "int8": 1 / 254, "float8_e4m3fn": 2**-4, "float8_e5m2": 2**-3}


def smallest_penalty(f, gamma):
    """Where ``beta^2/lam + beta (lam + beta) gamma/lam + gamma^2 (lam + beta)/2 - (1 - gamma)^2 (lam - mu)/2`` is 0."""
    beta, mu = f.smoothness, f.weak_convexity

    def bound(lam):
        return (
            beta**2 / lam
            + beta * (lam + beta) * gamma / lam
            + gamma**2 * (lam + beta) / 2
            - (1 - gamma) ** 2 * (lam - mu) / 2
        )

    low, high = 1e-3, 1e3
    assert bound(low) > 0 > bound(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if bound(middle) > 0 else (low, middle)
    return high


def solve(f, *, lam, gamma=0.0, dtype="fp32", updates=200):
    """The gap of z in each of the last updates."""
    torch.manual_seed(1)
    x = torch.randn(1, DIMENSION)
    state = ADMMState(x, KEEP, MaskStructure(), form="coupled", dtype=dtype)
    gaps = []
    for update in range(updates):
        before = x.clone()
        for _ in range(25):
            gradient = f.gradient(x).view_as(x)
            state.add_proximal_gradient_(gradient, x, lam)
            x -= gradient / (f.smoothness + lam)
        error = torch.randn_like(x)
        x += gamma * (x - before).norm() * error / error.norm()
        state.update(x, lam)
        if update >= updates - 20:
            gaps.append(stationarity_gap(f, state.split(x).flatten(), lam))
    return gaps


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("gamma", [0.02, 0.1, 0.2])
def test_inexact_updates_still_end_stationary(seed, gamma):
    f = WeaklyConvex(seed)
    lam = 1.1 * smallest_penalty(f, gamma)
    assert lam > 1.1 * f.smallest_penalty()
    assert max(solve(f, lam=lam, gamma=gamma)) < 1e-3


def test_without_inexactness_the_bound_is_the_other_one():
    f = WeaklyConvex(0)
    assert smallest_penalty(f, 0.0) == pytest.approx(f.smallest_penalty())


@pytest.mark.parametrize("dtype", PRECISION)
def test_low_precision_is_stationary_to_its_precision(dtype):
    f = WeaklyConvex(0)
    gamma = PRECISION[dtype]
    lam = 1.1 * smallest_penalty(f, gamma)
    gaps = solve(f, lam=lam, gamma=gamma, dtype=dtype)
    assert max(gaps) < max(1e-3, 2 * gamma)


def test_far_below_the_bound_inexact_updates_do_not_settle():
    f = WeaklyConvex(0)
    assert min(solve(f, lam=0.02 * smallest_penalty(f, 0.1), gamma=0.1)) > 1e-2
