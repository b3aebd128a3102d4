from itertools import pairwise

import pytest
import torch

from elsa_modifier.quantization import masked_gptq as module
from elsa_modifier.quantization.masked_gptq import masked_gptq
from tests.reference.gptq import masked_gptq_row

ROWS, COLUMNS = 12, 20


@pytest.fixture
def problem():
    """A weight, a Hessian with correlated inputs, masks from empty to full, and a grid of its own for each row."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, COLUMNS, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    hessian = inputs.T @ inputs
    mask = torch.rand(ROWS, COLUMNS, generator=generator) < torch.linspace(0, 1, ROWS)[:, None]
    mask[0], mask[-1] = False, True
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64) * mask
    steps = torch.linspace(0.1, 0.4, ROWS, dtype=torch.float64)
    order = torch.randperm(COLUMNS, generator=generator)
    return weight, hessian, mask, steps, order


def _run(problem, **options):
    weight, hessian, mask, steps, order = problem

    def quantize(values, rows, columns):
        return (values / steps[rows]).round().clamp(-8, 7) * steps[rows]

    return masked_gptq(weight, hessian, mask, quantize, order=order, damping=0.0, **options)


def test_agrees_with_its_twin(problem):
    weight, hessian, mask, steps, order = problem
    quantized, losses = _run(problem)
    for row in range(ROWS):
        step = float(steps[row])
        kept = mask[row].nonzero().view(-1).tolist()
        expected = masked_gptq_row(
            weight[row], hessian, kept, lambda v, _, s=step: max(-8, min(7, round(v / s))) * s, order.tolist()
        )
        assert torch.allclose(quantized[row], expected, atol=1e-12)
        error = weight[row] - expected
        assert float(losses[row]) == pytest.approx(float(0.5 * error @ hessian @ error), rel=1e-9, abs=1e-12)


def test_nothing_pruned_comes_back(problem):
    quantized, _ = _run(problem, refinements=3)
    assert torch.equal(quantized[~problem[2]], torch.zeros(int((~problem[2]).sum()), dtype=torch.float64))


def test_the_size_of_chunks_does_not_matter(problem, monkeypatch):
    whole, losses = _run(problem)
    for size in (1, 4 * COLUMNS**2 * 3):
        monkeypatch.setattr(module, "_CHUNK_BYTES", size)
        chunked, chunked_losses = _run(problem)
        assert torch.equal(chunked, whole) and torch.allclose(chunked_losses, losses)


def test_refinements_never_make_a_row_worse(problem):
    losses = [_run(problem, refinements=n)[1] for n in range(4)]
    for fewer, more in pairwise(losses):
        assert bool((more <= fewer + 1e-9).all())
    assert float(losses[1].sum()) < float(losses[0].sum())


def test_better_than_dropping_what_pruned_weights_would_take_up(problem):
    """The older rule: GPTQ with the factor of the whole Hessian, compensation multiplied by the mask."""
    weight, hessian, mask, steps, order = problem
    _, losses = _run(problem)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    w, q, m = weight[:, order].clone(), torch.zeros_like(weight), mask[:, order]
    for j in range(COLUMNS):
        q[:, j] = (w[:, j] / steps).round().clamp(-8, 7) * steps * m[:, j]
        error = (w[:, j] - q[:, j]) / factor[j, j]
        w[:, j:] -= error[:, None] * factor[j, j:] * m[:, j:]
    error = weight[:, order] - q
    old = 0.5 * torch.einsum("ri,ij,rj->r", error, hessian[order][:, order], error)
    assert float(losses.sum()) < 0.95 * float(old.sum())


def test_a_column_that_saw_no_input_is_rounded(problem):
    weight, hessian, mask, steps, order = problem
    hessian = hessian.clone()
    hessian[3], hessian[:, 3] = 0, 0
    quantized, _ = _run((weight, hessian, mask, steps, order))
    rows = mask[:, 3]
    assert torch.allclose(quantized[rows, 3], ((weight[:, 3] / steps).round().clamp(-8, 7) * steps)[rows])
