import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize

from elsa_modifier.quantization.grid import Grid

SHAPE = (3, 5)  # odd: entries are rounded one by one


def _args(**fields):
    return QuantizationArgs(strategy="channel", **fields)


def _scales():
    return torch.linspace(0.05, 0.3, 15).view(SHAPE)


@pytest.mark.parametrize(
    "args",
    [
        _args(num_bits=4),
        _args(num_bits=8),
        _args(num_bits=4, symmetric=False),
        _args(num_bits=8, type="float"),
        _args(num_bits=4, type="float"),
    ],
    ids=["int4", "int8", "int4 with zero points", "fp8", "fp4"],
)
def test_rounding_is_compressed_tensors(args):
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 2
    points = torch.tensor([[-3.0, 0.0, 2.0, 5.0, 7.0]]).expand(SHAPE) if not args.symmetric else None
    grid = Grid.of(args, _scales(), points)
    expected = torch.stack(
        [
            fake_quantize(v.view(1, 1), s.view(1, 1), None if p is None else p.view(1, 1), args).view(())
            for v, s, p in zip(
                values.flatten(),
                _scales().flatten(),
                [None] * 15 if points is None else points.flatten(),
                strict=True,
            )
        ]
    ).view(SHAPE)
    before = values.clone()
    torch.testing.assert_close(grid.round(values), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(values, before)
    torch.testing.assert_close(grid.transposed().round(values.T), expected.T, rtol=1e-6, atol=1e-7)
    assert grid.transposed().scales.is_contiguous()
    torch.testing.assert_close(grid[1].round(values[1]), expected[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grid[:, 2:].round(values[:, 2:]), expected[:, 2:], rtol=1e-6, atol=1e-7)


def test_integers_stay_within_their_limits():
    grid = Grid.of(_args(num_bits=4), torch.ones(SHAPE), None)
    assert grid.round(torch.full(SHAPE, 100.0)).unique().tolist() == [7.0]
    assert grid.round(torch.full(SHAPE, -100.0)).unique().tolist() == [-8.0]
