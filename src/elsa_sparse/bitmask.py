"""The ``sparse-bitmask`` layout of compressed-tensors up to 0.14: a bit a weight, and the weights that are not zero.

For a weight ``W`` of (rows, columns), leading dimensions of more than two counted as rows:

=====================  =====  =======================  =====================================================
part                   dtype  shape
=====================  =====  =======================  =====================================================
``W.compressed``       W's    (non-zeros,)             in row-major order
``W.bitmask``          uint8  (rows, ceil(columns/8))  bit ``j % 8`` of byte ``j // 8`` is column ``j``
``W.row_offsets``      int64  (rows,)                  where a row starts in ``compressed``
``W.shape``            int64  (dimensions,)
=====================  =====  =======================  =====================================================
"""

import math

import numpy as np
import torch
from torch import Tensor

from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.symbols import from_symbols, to_symbols

__all__ = ["PARTS", "decode_bitmask", "encode_bitmask"]

# Bits that are unpacked to bytes at once, or those of a row, if that has more.
_CHUNK = 1 << 20

PARTS = ("bitmask", "compressed", "row_offsets", "shape")


def _rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def encode_bitmask(tensor: Tensor) -> dict[str, Tensor]:
    """The four parts of a tensor with at least one dimension, by their suffix."""
    rows, columns = _rows_and_columns(tuple(tensor.shape))
    width = 8 * tensor.element_size()
    symbols = to_symbols(tensor, width).reshape(rows, columns)
    mask = symbols != 0
    counts = np.count_nonzero(mask, axis=1)
    values = symbols[mask]
    return {
        "bitmask": torch.from_numpy(np.packbits(mask, axis=1, bitorder="little")),
        "compressed": from_symbols(values, width, tensor.dtype, (values.size,)),
        "row_offsets": torch.from_numpy(np.cumsum(counts) - counts),
        "shape": torch.tensor(tuple(tensor.shape), dtype=torch.int64),
    }


def decode_bitmask(parts: dict[str, Tensor]) -> Tensor:
    """The dense tensor, of at most 64 times the size of its parts; allocates at most twice its size beside them.

    :raises SparseCheckpointError: if the parts contradict each other
    """
    bitmask, compressed, row_offsets, shape = (parts[part] for part in PARTS)
    if shape.dtype != torch.int64 or shape.dim() != 1 or not 1 <= shape.numel() <= 16 or bool((shape < 0).any()):
        raise SparseCheckpointError("shape is not a list of 1 to 16 dimensions")
    dimensions = tuple(shape.tolist())
    rows, columns = _rows_and_columns(dimensions)
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != (rows, -(-columns // 8)):
        raise SparseCheckpointError(
            f"shape {dimensions} needs a uint8 bitmask of {(rows, -(-columns // 8))}, the file has "
            f"{bitmask.dtype} {tuple(bitmask.shape)}"
        )
    if compressed.dim() != 1 or row_offsets.dtype != torch.int64 or tuple(row_offsets.shape) != (rows,):
        raise SparseCheckpointError(f"compressed has to be flat and row_offsets int64 of {(rows,)}")
    width = 8 * compressed.element_size()
    values = to_symbols(compressed, width)
    symbols = np.zeros((rows, columns), values.dtype)
    counts = np.empty(rows, np.int64)
    read, step = 0, max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        block = slice(start, start + step)
        bits = np.unpackbits(bitmask.numpy()[block], axis=1, bitorder="little").view(bool)
        if bits[:, columns:].any():
            raise SparseCheckpointError(f"the bitmask has bits beyond its {columns} columns")
        mask = bits[:, :columns]
        counts[block] = np.count_nonzero(mask, axis=1)
        count = int(counts[block].sum())
        if read + count <= values.size:
            symbols[block][mask] = values[read : read + count]
        read += count
    if read != values.size:
        raise SparseCheckpointError(f"the bitmask has {read:,} bits, compressed {values.size:,} values")
    if not np.array_equal(np.cumsum(counts) - counts, row_offsets.numpy()):
        raise SparseCheckpointError("row_offsets do not agree with the bitmask")
    return from_symbols(symbols.reshape(-1), width, compressed.dtype, dimensions)
