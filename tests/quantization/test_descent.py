from itertools import pairwise

import torch

from elsa_modifier.quantization import descent as module
from elsa_modifier.quantization.descent import coordinate_descent
from tests.reference.gptq import coordinate_descent_row


def test_agrees_with_its_twin(problem, monkeypatch):
    weight, hessian, mask, grid, _ = problem
    start = grid.round(weight) * mask
    for block in (1, 7, 128):
        monkeypatch.setattr(module, "_BLOCK", block)
        quantized = coordinate_descent(weight, start, hessian, mask, grid)
        for row in range(weight.shape[0]):
            step = float(grid.scales[row, 0])
            kept = mask[row].nonzero().view(-1).tolist()
            expected = coordinate_descent_row(
                weight[row], start[row], hessian, kept, lambda v, _, s=step: max(-8, min(7, round(v / s))) * s
            )
            assert torch.allclose(quantized[row], expected, atol=1e-6)


def test_no_pass_makes_a_row_worse(problem):
    weight, hessian, mask, grid, _ = problem
    results = [grid.round(weight) * mask]
    for _ in range(4):
        results.append(coordinate_descent(weight, results[-1], hessian, mask, grid))
        assert int((results[-1][~mask] != 0).sum()) == 0
    costs = [torch.einsum("ri,ij,rj->r", weight - q, hessian, weight - q) for q in results]
    assert all(bool((after <= before + 1e-6 * before).all()) for before, after in pairwise(costs))
    assert float(costs[1].sum()) < 0.8 * float(costs[0].sum())
