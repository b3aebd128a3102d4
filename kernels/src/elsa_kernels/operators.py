"""The torch operation. Every backend is registered in this file and nowhere else."""

import torch
from torch import Tensor

from elsa_kernels import fallback
from elsa_kernels.gpu_linear import gpu_linear
from elsa_kernels.layout import read_header

__all__ = ["linear"]

# torch.library.Library costs a call 3 us less than torch.library.custom_op.
_LIBRARY = torch.library.Library("elsa_kernels", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor packed, int rows) -> Tensor")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def linear(x: Tensor, packed: Tensor, rows: int) -> Tensor:
    """``torch.nn.functional.linear(x, unpack(packed))`` without unpacking.

    :param x: (..., columns), bf16, fp16 or fp32; any strides
    :param packed: what pack or pack_integers returned, checked by whoever loaded it
    :param rows: of the weight; given so that the result's shape is known without reading packed
    :return: (..., rows) of x's dtype; products are accumulated in fp32
    :raises ValueError: if packed is not a packed tensor of this shape
    """
    return torch.ops.elsa_kernels.linear(x, packed, rows)  # type: ignore[no-any-return]


def _linear_cpu(x: Tensor, packed: Tensor, rows: int) -> Tensor:
    header = read_header(packed)
    if x.dtype not in DTYPES or x.dim() == 0:
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; it must be (..., columns) of bf16, fp16 or fp32")
    if (rows, x.shape[-1]) != (header.rows, header.columns):
        raise ValueError(f"packed is {header.rows} x {header.columns}; x has {x.shape[-1]} columns, rows is {rows}")
    return fallback.linear(x.reshape(-1, header.columns), packed).view(*x.shape[:-1], rows)


def _linear_fake(x: Tensor, packed: Tensor, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


_LIBRARY.impl("linear", _linear_cpu, "CPU")
_LIBRARY.impl("linear", gpu_linear, "CUDA")
torch.library.register_fake("elsa_kernels::linear", _linear_fake, lib=_LIBRARY)
