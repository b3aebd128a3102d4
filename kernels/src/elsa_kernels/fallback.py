"""The product through torch, for machines without the compiled library: right, and no faster than a dense layer."""

import torch
from torch import Tensor

from elsa_kernels.reading import unpack

__all__ = ["linear"]


def linear(x: Tensor, packed: Tensor) -> Tensor:
    """``x @ unpack(packed).T``; x (tokens, columns) of bf16, fp16 or fp32.

    The weight is not rounded to x's dtype: products are of fp32, as the kernels' are, and the result is rounded.
    """
    return torch.mm(x.float(), unpack(packed, torch.float32).T).to(x.dtype)
