"""lam-stationarity (arXiv 2510.01650, section 4): a projected gradient step of size 1/lam does not move the limit."""

import math

import pytest
import torch
from torch import nn

from elsa_modifier.admm.constraint import PrunedWeight
from elsa_modifier.admm.optimizer import ADMMOptimizer
from elsa_modifier.admm.penalty import PenaltySchedule
from elsa_modifier.admm.projection import MaskStructure
from tests.reference.admm import keep_mask

DIMENSION, KEEP = 24, 6
WEAKNESS = 0.4


class WeaklyConvex:
    """``1/2 x'Ax - b'x + c sum x^2/(1 + x^2)``: lower bounded, smooth; the last term is not convex."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(DIMENSION, DIMENSION, generator=generator, dtype=torch.float64)).Q
        eigenvalues = torch.linspace(0.05, 1.0, DIMENSION, dtype=torch.float64)
        self.a = (basis @ torch.diag(eigenvalues) @ basis.T).float()
        self.b = torch.randn(DIMENSION, generator=generator)
        # x^2/(1 + x^2) has second derivatives from -1/2 to 2.
        self.smoothness = 1.0 + 2 * WEAKNESS
        self.weak_convexity = max(WEAKNESS / 2 - 0.05, 0.0)

    def __call__(self, x):
        x = x.flatten()
        return 0.5 * x @ self.a @ x - self.b @ x + WEAKNESS * (x.square() / (1 + x.square())).sum()

    def gradient(self, x):
        x = x.detach().clone().requires_grad_(True)
        return torch.autograd.grad(self(x), x)[0]

    def smallest_penalty(self):
        """Where ``beta^2 / lam - (lam - mu) / 2`` crosses zero."""
        mu, beta = self.weak_convexity, self.smoothness
        return (mu + math.sqrt(mu**2 + 8 * beta**2)) / 2


def stationarity_gap(f, x, lam, gradient_at=None):
    """How far a projected gradient step of size 1/lam moves x, relative to its norm."""
    step = x - f.gradient(x if gradient_at is None else gradient_at) / lam
    return float((step * keep_mask(step.abs(), KEEP) - x).norm() / x.norm())


def solve(f, *, form, penalty, learning_rate, updates=120, inner=60, gradient_at="z", **options):
    """Gaps of z after each of the last updates, each x-update solved by plain gradient steps."""
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(1, DIMENSION))
    base = torch.optim.SGD([weight], lr=learning_rate)
    optimizer = ADMMOptimizer(
        base,
        [PrunedWeight("x", weight, KEEP, MaskStructure())],
        penalty=PenaltySchedule(penalty, "constant", 1),
        form=form,
        **options,
        interval=inner,
        projection="magnitude",
        freeze_step=10**9,
    )
    lam = penalty if form == "coupled" else penalty / (learning_rate * (1 - penalty))
    gaps = []
    for update in range(updates):
        for _ in range(inner):
            optimizer.zero_grad()
            f(weight).backward()
            optimizer.step()
        if update >= updates - 40:
            point = None if gradient_at == "z" else weight.detach()
            gaps.append(stationarity_gap(f, optimizer.states[0].split(weight), lam, point))
    return gaps


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_coupled_limit_is_stationary(seed):
    f = WeaklyConvex(seed)
    lam = 1.1 * f.smallest_penalty()
    gaps = solve(f, form="coupled", penalty=lam, learning_rate=1 / (f.smoothness + lam))
    assert gaps[-1] < 1e-3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_decoupled_limit_is_stationary_in_its_own_metric(seed):
    f = WeaklyConvex(seed)
    learning_rate = 0.05
    # rho / (lr (1 - rho)) takes the place of lam when the base optimizer is plain gradient descent.
    lam = 1.1 * f.smallest_penalty()
    rho = lam * learning_rate / (1 + lam * learning_rate)
    gaps = solve(f, form="decoupled", dual=True, penalty=rho, learning_rate=learning_rate)
    assert gaps[-1] < 1e-3


def test_too_small_a_penalty_does_not_settle():
    """Below the bound the guarantee is gone, and on this problem it is needed: the iterates go on moving."""
    f = WeaklyConvex(0)
    lam = 0.02 * f.smallest_penalty()
    gaps = solve(f, form="coupled", penalty=lam, learning_rate=1 / (f.smoothness + lam))
    assert min(gaps) > 1e-2


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("fraction", [0.02, 1.1])
def test_without_a_dual_the_limit_is_stationary_at_any_penalty(seed, fraction):
    """It minimizes ``f(x) + lam/2 ||x - z||^2`` in turns, which can only fall; the gradient is that at ``x``."""
    f = WeaklyConvex(seed)
    learning_rate = 0.05
    lam = fraction * f.smallest_penalty()
    rho = lam * learning_rate / (1 + lam * learning_rate)
    gaps = solve(f, form="decoupled", penalty=rho, learning_rate=learning_rate, gradient_at="x", updates=400)
    assert gaps[-1] < 1e-3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_a_dual_the_residual_goes_with_the_learning_rate(seed):
    """At a given fraction a step: so a rate that decays to 0 leaves nothing for a dual to do."""
    f, rho, residuals = WeaklyConvex(seed), 0.3, []
    for learning_rate in (0.08, 0.008):
        torch.manual_seed(1)
        weight = nn.Parameter(torch.randn(1, DIMENSION))
        optimizer = ADMMOptimizer(
            torch.optim.SGD([weight], lr=learning_rate),
            [PrunedWeight("x", weight, KEEP, MaskStructure())],
            penalty=PenaltySchedule(rho, "constant", 1),
            interval=10,
            projection="magnitude",
            freeze_step=10**9,
        )
        for _ in range(round(100 / learning_rate)):
            optimizer.zero_grad()
            f(weight).backward()
            optimizer.step()
        pruned = ~optimizer.masks["x"].flatten()
        settled = -(1 - rho) / rho * learning_rate * f.gradient(weight.detach()).flatten()
        torch.testing.assert_close(weight.detach().flatten()[pruned], settled[pruned], rtol=1e-3, atol=1e-6)
        residuals.append(float(optimizer.residual()))
    assert residuals[1] < residuals[0] / 5
