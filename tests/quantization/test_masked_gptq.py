import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from elsa_modifier.quantization import masked_gptq as module
from elsa_modifier.quantization.grid import Grid
from elsa_modifier.quantization.masked_gptq import damped, masked_gptq
from tests.reference.gptq import masked_gptq_row


def _run(problem):
    weight, hessian, mask, grid, order = problem
    return masked_gptq(weight, hessian, mask, grid, order=order)


def _cost(problem, quantized):
    errors = problem[0] - quantized
    return torch.einsum("ri,ij,rj->r", errors, problem[1], errors)


def test_agrees_with_its_twin(problem):
    weight, hessian, mask, grid, order = problem
    quantized = _run(problem)
    for row in range(weight.shape[0]):
        step = float(grid.scales[row, 0])
        kept = mask[row].nonzero().view(-1).tolist()
        expected = masked_gptq_row(
            weight[row], hessian, kept, lambda v, _, s=step: max(-8, min(7, round(v / s))) * s, order.tolist()
        )
        assert torch.allclose(quantized[row], expected, atol=1e-6)


def test_nothing_pruned_comes_back(problem):
    assert int((_run(problem)[~problem[2]] != 0).sum()) == 0


def test_the_size_of_chunks_does_not_matter(problem, monkeypatch):
    whole = _run(problem)
    monkeypatch.setattr(module, "_CHUNK_HESSIANS", 0)
    for size in (1, 4 * problem[0].shape[1] ** 2 * 3):
        monkeypatch.setattr(module, "_CHUNK_BYTES", size)
        assert torch.equal(_run(problem), whole)


@pytest.mark.parametrize(("rows", "columns"), [(4096, 11008), (4096, 4096), (512, 2048), (576, 1536)])
@pytest.mark.parametrize("sparsity", [0.6, 0.8, 0.9])
def test_the_walk_is_short_beside_the_factors(rows, columns, sparsity):
    """A step of it, in Python, takes about as long as 5 million operations on a CPU core."""
    generator = torch.Generator().manual_seed(0)
    spread = (sparsity * (1 - sparsity) * columns) ** 0.5
    kept = ((1 - sparsity) * columns + spread * torch.randn(rows, generator=generator)).int().sort().values.tolist()
    chunks = list(module._chunks(kept, columns))
    assert [start for start, _ in chunks] == [0, *(end for _, end in chunks[:-1])] and chunks[-1][1] == rows
    steps = sum(kept[end - 1] for _, end in chunks)
    assert steps <= columns or sum(count**3 / 3 for count in kept) / steps > max(17e6, columns**2 / 2)
    largest = max(4 * kept[end - 1] ** 2 * (end - start) for start, end in chunks)
    assert largest <= max(1 << 28, 2 * 4 * columns**2)


def test_better_than_dropping_what_pruned_weights_would_take_up(problem):
    """The older rule: GPTQ with the factor of the whole Hessian, compensation multiplied by the mask."""
    weight, hessian, mask, grid, order = problem
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    w, q, m = weight[:, order].clone(), torch.zeros_like(weight), mask[:, order]
    for j in range(weight.shape[1]):
        q[:, j] = grid[:, order[j]].round(w[:, j]) * m[:, j]
        error = (w[:, j] - q[:, j]) / factor[j, j]
        w[:, j:] -= error[:, None] * factor[j, j:] * m[:, j:]
    assert float(_cost(problem, _run(problem)).sum()) < 0.95 * float(_cost(problem, q[:, order.argsort()]).sum())


def test_a_column_that_saw_no_input_is_rounded(problem):
    weight, hessian, mask, grid, order = problem
    hessian = hessian.clone()
    hessian[3], hessian[:, 3] = 0, 0
    quantized = _run((weight, damped(hessian, 0.01), mask, grid, order))
    rows = mask[:, 3]
    assert torch.allclose(quantized[rows, 3], grid[rows, 3].round(weight[rows, 3]))


def test_damping_adds_a_fraction_of_the_mean():
    hessian = torch.tensor([[3.0, 1.0, 0.0], [1.0, 6.0, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[3.3, 1.0, 0.0], [1.0, 6.3, 0.0], [0.0, 0.0, 1.3]])
    assert torch.allclose(damped(hessian, 0.1), expected)


@pytest.mark.parametrize("args", [{"num_bits": 4}, {"num_bits": 8}, {"num_bits": 4, "symmetric": False}])
def test_integer_grids_round_as_compressed_tensors_does(args):
    """The last of a grid's kinds is rounded by compressed-tensors itself: every kind must give what that gives."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 40, generator=generator)
    scales = torch.rand(50, 40, generator=generator).add(0.02).bfloat16()
    zeros = None if args.get("symmetric", True) else torch.randint(-8, 8, (50, 40), generator=generator)
    ours = Grid.of(QuantizationArgs(**args), scales, zeros)
    theirs = Grid(ours.args, ours.scales, ours.zero_points, None)
    assert torch.equal(ours.round(values), theirs.round(values))
    assert torch.equal(ours.transposed()[3].round(values[:, 3]), theirs.round(values)[:, 3])
