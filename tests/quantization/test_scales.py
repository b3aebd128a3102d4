import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from elsa_modifier.quantization.grid import Grid
from elsa_modifier.quantization.scales import least_squares_scales, search_scales

ROWS, COLUMNS, GROUP = 6, 24, 8


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(ROWS, COLUMNS, generator=generator) < 0.4
    mask[0] = False
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * mask
    inputs = torch.randn(100, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    scale = weight.view(ROWS, -1, GROUP).abs().amax(dim=2) / 7.5 + 1e-6
    return weight, mask, inputs.T @ inputs, scale


def round_to(weight, scale):
    entries = scale.repeat_interleave(GROUP, dim=1)
    return (weight / entries).round().clamp(-8, 7) * entries


def grid_of(scale):
    return Grid.of(QuantizationArgs(num_bits=4), scale.repeat_interleave(GROUP, dim=1), None)


def test_search_finds_the_best_fraction_of_each_group(problem):
    weight, mask, hessian, scale = problem
    importance = hessian.diagonal()
    found = search_scales(weight, mask, importance, scale, grid_of)

    def errors(scale):
        return ((weight - round_to(weight, scale)).square() * importance).view(ROWS, -1, GROUP).sum(dim=2)

    best = torch.stack([errors(scale * fraction) for fraction in torch.linspace(0.4, 1.1, 29).tolist()]).amin(dim=0)
    assert torch.allclose(errors(found), best, rtol=1e-4)
    assert float(errors(found).sum()) < 0.9 * float(errors(scale).sum())


def test_least_squares_agrees_with_its_twin(problem):
    weight, _, hessian, scale = problem
    quantized = round_to(weight, scale)
    fitted = least_squares_scales(weight, quantized, hessian, scale)
    factor = torch.linalg.cholesky(hessian.double(), upper=True)
    for row in range(1, ROWS):
        integers = torch.zeros(COLUMNS, COLUMNS // GROUP, dtype=torch.float64)
        for column in range(COLUMNS):
            group = column // GROUP
            integers[column, group] = (quantized[row, column] / scale[row, group]).round()
        used = integers.any(dim=0)
        twin = torch.linalg.lstsq(factor @ integers[:, used], factor @ weight[row].double().unsqueeze(1)).solution
        assert torch.allclose(fitted[row, used].double(), twin.squeeze(1), rtol=1e-3)
        assert torch.equal(fitted[row, ~used], scale[row, ~used])


def test_least_squares_does_not_trust_extremes(problem):
    """Integers that fit nothing leave the scale as it was."""
    weight, _, hessian, scale = problem
    assert torch.equal(least_squares_scales(-weight, round_to(weight, scale), hessian, scale)[1:], scale[1:])
