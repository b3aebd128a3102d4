"""Weights for the tests of the kernels."""

import torch
from torch import Tensor

# Rows that fill no slice of 16, columns that fill no window of 64 or pair, single ones, and plain ones.
SHAPES = [(1, 1), (3, 5), (17, 63), (16, 64), (40, 65), (33, 130), (64, 256)]


def sparse_weight(rows: int, columns: int, density: float, *, uneven: bool = False, seed: int = 0) -> Tensor:
    """(rows, columns) fp32, normal with sd 0.02 where it is not zero.

    :param uneven: rows differ in density by up to a factor of 30
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    limits = torch.full((rows, 1), density)
    if uneven:
        limits = limits * 2 ** (5 * torch.rand(rows, 1, generator=generator) - 3)
    return torch.where(torch.rand(rows, columns, generator=generator) < limits, weight, 0.0)
