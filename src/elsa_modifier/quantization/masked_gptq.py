"""GPTQ of a pruned weight: errors are compensated by kept weights alone, with the inverse Hessian that is theirs.

For a row with kept columns S, quantizing its weights ``w`` to ``q`` costs ``(w - q)^T H_SS (w - q)``: pruned entries
are zero before and after, so their rows of ``H`` do not matter. GPTQ's usual factor, of all of ``H``, counts on pruned
weights to take up part of each error; multiplying what they would take up by the mask (the rule of older versions of
llm-compressor) drops it instead of giving it to the others. Here every row has its own ``H_SS``.

GPTQ from the first column to the last is the nearest-plane walk along the Cholesky factor of the reversed matrix, so no
inverse is needed: with ``H_SS = L L^T``, L lower triangular, and e = w - q, from the last column of S to the first

    q_j = quantize(w_j + sum_{k > j} L_kj e_k / L_jj).

A factor costs |S|^3 / 3 a row: at 90% a thousandth of what the dense one would. Rows with about as many kept columns
are factored together, as many as fit in twice the memory of the whole Hessian (or 256 MB): rows that keep a fraction d
of their columns are walked ``2 / d^2`` at a time, so that the walk, one step in Python a column, stays short beside the
factors. With the factors, the mask of what is padded, and copies of the values, about five times the Hessian is held.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from elsa_modifier.quantization.grid import Grid

__all__ = ["damped", "masked_gptq"]

# Of the sub-Hessians that are factored at once, whichever is more: bytes, and multiples of the Hessian.
_CHUNK_BYTES = 1 << 28
_CHUNK_HESSIANS = 2


def damped(hessian: Tensor, fraction: float) -> Tensor:
    """``hessian`` (columns, columns) plus a fraction of its diagonal's mean, as GPTQ does it."""
    diagonal = hessian.diagonal()
    hessian = hessian.clone()
    # A column that never saw an input has no curvature; any will do.
    hessian.diagonal().copy_(torch.where(diagonal == 0, 1.0, diagonal) + fraction * diagonal.mean())
    return hessian


@torch.no_grad()
def masked_gptq(weight: Tensor, hessian: Tensor, mask: Tensor, grid: Grid, *, order: Tensor) -> Tensor:
    """Quantize the kept entries of a weight.

    :param weight: (rows, columns), fp32, zero outside the mask
    :param hessian: (columns, columns), fp32: sum of ``x x^T`` over inputs ``x``, times any number; see :func:`damped`
    :param mask: (rows, columns), bool: kept entries
    :param grid: (rows, columns)
    :param order: (columns,): columns in the order in which they are quantized
    :return: (rows, columns), zero outside the mask
    :raises torch.linalg.LinAlgError: if the Hessian is not positive definite for some row
    """
    columns = weight.shape[1]
    last_to_first = order.flip(0)
    hessian = hessian[last_to_first][:, last_to_first]
    kept = mask[:, last_to_first]
    counts = kept.sum(dim=1)
    by_count = counts.argsort(stable=True)
    ascending = counts[by_count].tolist()
    result = torch.zeros_like(weight)
    for start, end in _chunks(ascending, columns):
        chunk = by_count[start:end]
        width = ascending[end - 1]
        # Positions of the kept columns at the end, in order; what pads shorter rows comes first.
        places = kept[chunk].int().argsort(dim=1, stable=True)[:, columns - width :]
        used = kept[chunk].gather(1, places)
        index = (chunk[:, None].expand_as(places), last_to_first[places])
        quantized = _nearest_plane(weight[index], _sub_hessians(hessian, places, used), used, grid[index])
        result[index[0][used], index[1][used]] = quantized[used]
    return result


def _chunks(ascending: list[int], columns: int) -> Iterator[tuple[int, int]]:
    """Rows from and to which are factored together, given how many columns each keeps; none that keeps nothing."""
    available = max(_CHUNK_BYTES, _CHUNK_HESSIANS * 4 * columns**2)
    start = sum(count == 0 for count in ascending)
    while start < len(ascending):
        # Of as many rows as fit, the last has the most kept columns; those it determines must fit as well.
        end = start + 1
        while end < len(ascending) and 4 * ascending[end] ** 2 * (end + 1 - start) <= available:
            end += 1
        yield start, end
        start = end


def _sub_hessians(hessian: Tensor, places: Tensor, used: Tensor) -> Tensor:
    """(rows, width, width): each row's own columns of the Hessian, the identity where it is padded."""
    sub = hessian[places[:, :, None], places[:, None, :]]
    padded = int((~used).sum(dim=1).max())
    if padded:
        first = used[:, :padded]
        sub[:, :padded] *= first[:, :, None]
        sub[:, :, :padded] *= first[:, None, :]
        sub.diagonal(dim1=1, dim2=2)[:, :padded].add_((~first).to(sub.dtype))
    return sub


def _nearest_plane(values: Tensor, hessians: Tensor, used: Tensor, grid: Grid) -> Tensor:
    """Values (rows, width), each row with its Hessian (rows, width, width), from the last column to the first."""
    # LAPACK's matrices are columns: transposed, what a column is owed by lies together.
    factors = torch.linalg.cholesky(hessians).mT
    errors = torch.zeros_like(values)
    for j in reversed(range(values.shape[1])):
        owed = (factors[:, j, j + 1 :] * errors[:, j + 1 :]).sum(dim=1) / factors[:, j, j]
        rounded = grid[:, j].round(values[:, j] + owed)
        errors[:, j] = torch.where(used[:, j], values[:, j] - rounded, 0.0)
    return values - errors
