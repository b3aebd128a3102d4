"""The product of activations and a weight packed for a GPU: which kernel, and how it is launched.

Not yet run on a GPU: kernels were checked under Triton's interpreter, and the numbers that choose between them are
guesses.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

__all__ = ["FEW_TOKENS", "gpu_dense", "gpu_linear"]

# Up to here the weight is read compressed. Not measured: it is what fits into one program's registers.
FEW_TOKENS = 16
# A warp a row, or several rows a warp where rows are short. Not measured either.
ROWS = 4


def gpu_linear(x: Tensor, packed: Tensor, rows: int) -> Tensor:
    """``torch.nn.functional.linear(x, weight)`` for a packed weight; sums in fp32, the same ones every time.

    Up to 16 tokens the weight stays compressed. With more it is decompressed into scratch of rows * columns elements of
    x's dtype, which torch's own product then takes.

    The host reads nothing that is on the device: sizes come from shapes, all else is read by the kernels. They answer
    NaN for a packed weight of another shape or of a CPU; ``read_gpu_header`` says at loading what is wrong with it.

    :param x: (..., columns) bfloat16, float16 or float32
    :param packed: what ``pack_for_gpu`` or ``pack_integers_for_gpu`` returned, on x's device
    :param rows: of the weight
    :return: (..., rows) of x's dtype
    :raises ValueError: if arguments cannot be that
    """
    columns = x.shape[-1] if x.dim() else 0
    _check(packed, rows, columns)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or x.device != packed.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}; it must be bf16, fp16 or fp32 on the device of packed, {packed.device}"
        )
    tokens = x.numel() // columns
    if tokens > FEW_TOKENS:
        return linear(x, gpu_dense(packed, rows, columns, x.dtype))
    y = x.new_empty((*x.shape[:-1], rows))
    if tokens:
        padded = 1 << (tokens - 1).bit_length()
        flat = x.reshape(tokens, columns)
        if padded > tokens:
            flat = pad(flat, (0, 0, 0, padded - tokens))
        # Fewer pairs at a time where each has more sums: they are kept in registers.
        pairs = _pairs(packed, rows, 64 if padded > 2 else 128)
        arguments = flat.t().contiguous(), packed.view(torch.int32), y, rows, columns, tokens
        _launch("linear_kernel", arguments, rows, pairs, TOKENS=padded)
    return y


def gpu_dense(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight by the kernel that the product with many tokens uses; ``unpack_gpu`` is its twin in torch.

    :return: (rows, columns) of this dtype, int8 times its scales
    :raises ValueError: if packed cannot be a packed weight of this shape
    """
    _check(packed, rows, columns)
    dense = torch.zeros(rows, columns, dtype=dtype, device=packed.device)
    _launch("dense_kernel", (packed.view(torch.int32), dense, rows, columns), rows, _pairs(packed, rows, 128))
    return dense


def _pairs(packed: Tensor, rows: int, most: int) -> int:
    """Pairs of slots a program takes at a time: about those of an average row, told from the bytes, which are known."""
    average = packed.numel() // (5 * rows)
    return min(most, max(32, 1 << max(0, average - 1).bit_length()))


def _check(packed: Tensor, rows: int, columns: int) -> None:
    if packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.is_contiguous() or packed.numel() % 16:
        raise ValueError(f"packed is {tuple(packed.shape)} {packed.dtype}; it must be what pack_for_gpu returned")
    if min(rows, columns) < 1 or packed.numel() < 64 + 4 * (rows + 1):
        raise ValueError(f"packed has {packed.numel()} bytes, which no weight of {rows} rows and {columns} columns has")


def _launch(name: str, arguments: tuple[Any, ...], rows: int, pairs: int, **sizes: int) -> None:
    try:
        from elsa_kernels import triton_gaps
    except ImportError as missing:
        raise ImportError("elsa_kernels computes on GPUs through triton: pip install triton") from missing
    kernel = getattr(triton_gaps, name)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(arguments[0]):
        kernel[(-(-rows // ROWS),)](*arguments, ROWS=ROWS, PAIRS=pairs, num_warps=pairs // 32, **sizes)
