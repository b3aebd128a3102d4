"""Products through torch, of a weight that is unpacked for each: without the library, and for very many tokens."""

import torch
from torch import Tensor

from elsa_kernels.layout import VALUE_CODES, read_header
from elsa_kernels.reading import unpack

__all__ = ["dense_dtype", "linear", "through_dense"]


def linear(x: Tensor, packed: Tensor) -> Tensor:
    """``x @ unpack(packed).T`` for x (..., columns) of bf16, fp16 or fp32."""
    return through_dense(x, unpack(packed, dense_dtype(x, packed)))


def dense_dtype(x: Tensor, packed: Tensor) -> torch.dtype:
    """The dtype to multiply in: bf16 if x and the weight both are, or the weight is of integers; otherwise fp32."""
    values = read_header(packed).values
    exact = values not in (VALUE_CODES["fp16"], VALUE_CODES["fp32"])
    return torch.bfloat16 if exact and x.dtype == torch.bfloat16 else torch.float32


def through_dense(x: Tensor, weight: Tensor) -> Tensor:
    """The product in the weight's dtype, rounded to x's."""
    return torch.nn.functional.linear(x.to(weight.dtype), weight).to(x.dtype)
