"""The torch operation. Every device's kernel is registered in this file and nowhere else."""

import torch
from torch import Tensor

from elsa_kernels import fallback
from elsa_kernels.gpu_linear import gpu_linear
from elsa_kernels.layout import read_header
from elsa_kernels.library import TYPE_CODES, compiled, raise_if_wrong

__all__ = ["linear"]

# torch.library.Library costs a call 3 us less than torch.library.custom_op.
_LIBRARY = torch.library.Library("elsa_kernels", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor packed, int rows) -> Tensor")


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
    library = compiled()
    code = TYPE_CODES.get(x.dtype)
    if code is None or x.dim() == 0:
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; it must be (..., columns) of bf16, fp16 or fp32")
    shape = x.shape
    columns = shape[-1]
    if library is None or packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        return _linear_torch(x, packed, rows)
    x = x.contiguous()
    y = x.new_empty((*shape[:-1], rows))
    tokens = x.numel() // columns if columns else 0
    addresses = x.data_ptr(), code, tokens, columns, rows, y.data_ptr()
    problem = library.linear(packed.data_ptr(), packed.numel(), *addresses)
    if problem is None:
        return y
    if problem == b"dense":
        return fallback.through_dense(x, library.unpack(packed, rows, columns, fallback.dense_dtype(x, packed)))
    raise_if_wrong(problem)
    return y


def _linear_torch(x: Tensor, packed: Tensor, rows: int) -> Tensor:
    header = read_header(packed)
    if (rows, x.shape[-1]) != (header.rows, header.columns):
        raise_if_wrong(b"it has other rows and columns than x and rows")
    return fallback.linear(x, packed)


def _linear_fake(x: Tensor, packed: Tensor, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_LIBRARY.impl("linear", _linear_cpu, "CPU")
_LIBRARY.impl("linear", gpu_linear, "CUDA")
torch.library.register_fake("elsa_kernels::linear", _linear_fake, lib=_LIBRARY)
