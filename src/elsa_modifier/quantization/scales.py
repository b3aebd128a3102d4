"""Scales of a quantized pruned weight, fitted to the weights that are kept.

Observers take a group's largest weight for the end of the grid. A group that is pruned keeps few weights, all far from
zero, and a finer grid that cuts the largest off is often the better one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from elsa_modifier.quantization.grid import Grid

__all__ = ["least_squares_scales", "search_scales"]

# Fractions of an observer's scale that are tried.
_FRACTIONS = torch.linspace(0.4, 1.1, 29).tolist()
# A fitted scale further than this from the one it started from is not trusted.
_FURTHEST = 3.0
_CHUNK_BYTES = 1 << 27


def search_scales(
    weight: Tensor, mask: Tensor, importance: Tensor, scale: Tensor, grid_of: Callable[[Tensor], Grid]
) -> Tensor:
    """The fraction of each group's scale that rounds its kept weights with the least error.

    :param weight: (rows, columns), fp32
    :param mask: (rows, columns), bool: kept entries
    :param importance: (columns,), of a column's squared errors: the diagonal of the Hessian
    :param scale: (rows, groups); a group is ``columns / groups`` consecutive columns
    :param grid_of: function of scales to the weight's grid
    :return: (rows, groups), of the scale's dtype
    """
    rows, columns = mask.nonzero(as_tuple=True)
    values = weight[rows, columns]
    groups = rows * scale.shape[1] + columns // (weight.shape[1] // scale.shape[1])
    best, least = scale, None
    for fraction in _FRACTIONS:
        tried = (scale * fraction).to(scale.dtype)
        squared = (values - grid_of(tried)[rows, columns].round(values)).square() * importance[columns]
        errors = torch.zeros(scale.numel(), device=scale.device).index_add_(0, groups, squared).view_as(scale)
        better = torch.ones_like(errors, dtype=torch.bool) if least is None else errors < least
        least = errors if least is None else torch.where(better, errors, least)
        best = torch.where(better, tried, best)
    return best


def least_squares_scales(weight: Tensor, quantized: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
    """The scales that make a row's integers fit it best: the minimum of ``(w - Z s)^T H (w - Z s)`` over ``s``.

    :param weight: (rows, columns), fp32
    :param quantized: (rows, columns): the integers ``Z`` (less their zero points) times their group's scale
    :param hessian: (columns, columns)
    :param scale: (rows, groups), of ``quantized``
    :return: (rows, groups), of the scale's dtype
    """
    rows, columns = weight.shape
    count = scale.shape[1]
    size = columns // count
    blocks = hessian.view(count, size, count, size)
    fitted = scale.float().clone()
    step = max(1, _CHUNK_BYTES // (4 * columns * count))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        old = scale[part].float()
        integers = quantized[part].float().view(-1, count, size) / old.unsqueeze(2)
        weighted = torch.einsum("gihj,rhj->rgih", blocks, integers)
        normal = torch.einsum("rgi,rgih->rgh", integers, weighted)
        right = torch.einsum("rgi,rgih->rh", weight[part].view(-1, count, size), weighted)
        # A group without integers has no equation; any scale will do.
        normal.diagonal(dim1=1, dim2=2).add_(1e-6 * normal.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True) + 1e-12)
        new = torch.linalg.solve(normal, right.unsqueeze(2)).squeeze(2)
        trusted = (new > old / _FURTHEST) & (new < old * _FURTHEST)
        fitted[part] = torch.where(trusted, new, old)
    return fitted.to(scale.dtype)
