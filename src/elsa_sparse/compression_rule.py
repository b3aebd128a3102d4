"""Which weights stay compressed in memory: the one rule, for whatever loads a model or says what it will take."""

import importlib
from typing import Any

import torch

__all__ = ["DEFAULT_MIN_SPARSITY", "FLOATS", "INTEGERS", "kernels", "packed_size"]

DEFAULT_MIN_SPARSITY = 0.4
"""Zeros below which a weight stays dense: the products are no faster there, and the weight is hardly smaller."""

INTEGERS = ("int8", "int4")
"""What kept weights may be rounded to."""

FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""Names that elsa_kernels has for the dtypes in which it keeps weights as they are; others stay dense."""


def kernels() -> Any:
    """The module ``elsa_kernels``, which packs weights and multiplies with them.

    :raises ImportError: if it is not installed
    """
    try:
        return importlib.import_module("elsa_kernels")
    except ModuleNotFoundError as error:
        if error.name != "elsa_kernels":
            raise
        raise ImportError(
            "compressed weights need the package elsa-kernels, which is not installed: `pip install elsa-kernels`, or "
            "`pip install ./kernels` in a checkout of elsa-modifier; without it, leave out compressed",
            name="elsa_kernels",
        ) from error


def packed_size(
    rows: int,
    columns: int,
    kept: int,
    dtype: torch.dtype,
    *,
    values: str | None = None,
    group_size: int | None = None,
    min_sparsity: float = DEFAULT_MIN_SPARSITY,
) -> int | None:
    """Bytes of a weight that is compressed in memory, or None if it stays dense.

    It is compressed if at least ``min_sparsity`` of it is zero and it gets smaller.

    :param rows: outputs of the layer
    :param columns: inputs of the layer
    :param kept: entries that are not zero
    :param dtype: of the dense weight
    :param values: one of :data:`INTEGERS` if kept weights are rounded; None for as they are
    :param group_size: columns that share a scale, of integers; None for what ``elsa_kernels.pack`` takes by itself
    :raises ImportError: if ``elsa_kernels`` is not installed
    """
    if dtype not in FLOATS or not rows or not columns or kept > (1 - min_sparsity) * rows * columns:
        return None
    if values is None:
        group_size = 0
    elif group_size is None:
        group_size = min(columns, 128) if values == "int4" else columns
    size: int = kernels().packed_nbytes(rows, columns, kept, values or FLOATS[dtype], group_size)
    return size if size < rows * columns * dtype.itemsize else None
