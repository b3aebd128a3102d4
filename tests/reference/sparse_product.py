"""A sparse layer's product as it is written on paper: fp64, of the dense weight."""

import torch
from torch import Tensor


def dequantized(integers: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """(rows, columns) fp64 of int8 (rows, columns) and scales (rows, groups)."""
    weight = torch.zeros(integers.shape, dtype=torch.float64)
    for column in range(integers.shape[1]):
        weight[:, column] = integers[:, column].double() * scales[:, column // group_size].double()
    return weight


def product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, rows) ``x @ weight.T`` and the sum of the magnitudes of its products, which bounds rounding errors."""
    x, weight = x.double(), weight.double()
    return x @ weight.T, x.abs() @ weight.abs().T


def tolerance(result: Tensor, magnitude: Tensor, dtype: torch.dtype, weight_rounding: float = 0.0) -> Tensor:
    """The most that a product in fp32, rounded to ``dtype``, may be off.

    :param weight_rounding: relative, where a kernel is allowed to round weights first
    """
    return torch.finfo(dtype).eps * result.abs() + (1e-5 + weight_rounding) * magnitude + 1e-7
