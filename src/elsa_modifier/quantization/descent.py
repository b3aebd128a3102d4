"""Coordinate descent over a quantized weight: every kept entry in turn, rounded to where it is best given the others.

GPTQ never looks back at a weight it has rounded. Changing the entry j of a row with error e = w - q by t changes the
row's cost e^T H e / 2 by t (H e)_j + t^2 H_jj / 2, least at e_j - (H e)_j / H_jj. The columns are walked for all rows
at once, and as in GPTQ their effect on columns further on is added a block at a time, in one product of matrices.
"""

import torch
from torch import Tensor

from elsa_modifier.quantization.grid import Grid

__all__ = ["coordinate_descent"]

_BLOCK = 128


@torch.no_grad()
def coordinate_descent(weight: Tensor, quantized: Tensor, hessian: Tensor, mask: Tensor, grid: Grid) -> Tensor:
    """One pass over the columns, that makes no row worse.

    :param weight: (rows, columns), zero outside the mask
    :param quantized: (rows, columns), zero outside the mask
    :param hessian: (columns, columns), positive diagonal
    :param mask: (rows, columns), bool: kept entries
    :param grid: (rows, columns)
    :return: (rows, columns), zero outside the mask
    """
    # Transposed, so that a column is contiguous.
    values, kept, grid = weight.T.contiguous(), mask.T.contiguous(), grid.transposed()
    errors = values - quantized.T
    gradients = hessian @ errors
    columns = weight.shape[1]
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        before = errors[start:end].clone()
        within = hessian[start:end, start:end]
        for j in range(start, end):
            curvature = hessian[j, j]
            best = values[j] - errors[j] + gradients[j] / curvature
            change = torch.where(kept[j], values[j] - grid[j].round(best) - errors[j], 0.0)
            # Rounding to the nearest is best on a uniform grid; on fp8's, or where the grid ends, nearly.
            gain = change * (gradients[j] + 0.5 * curvature * change)
            change = torch.where(gain < 0, change, 0.0)
            errors[j] += change
            gradients[start:end].addr_(within[j - start], change)
        gradients[end:].addmm_(hessian[end:, start:end], errors[start:end] - before)
    return (values - errors).T.contiguous()
