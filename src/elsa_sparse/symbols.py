"""A tensor as a flat array of unsigned integers, its bits untouched, and back.

The payloads of NaNs are values like any other, and so is -0.0, unless it is made 0.0 before. Multi-byte symbols are
little-endian, as in safetensors.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "DTYPES",
    "SAFETENSORS_DTYPES",
    "Symbols",
    "count_negative_zeros",
    "count_symbols",
    "from_symbols",
    "raw_bytes",
    "symbol_dtype",
    "to_symbols",
    "with_positive_zeros",
]

# Arrays of unsigned integers; numpy's stubs take operators on them for something else.
Symbols = NDArray[Any]

# Bytes compared at once, so that no mask of a whole tensor is made.
_CHUNK = 1 << 22

# What a safetensors file may hold: its name of a dtype, and torch's.
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The same by torch's name without ``torch.``, which is what a checkpoint's table says.
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_DTYPES.values()}


def symbol_dtype(bits: int) -> np.dtype[np.unsignedinteger]:
    """numpy's type of an array of symbols: 4-bit ones lie one in a byte."""
    return np.dtype(f"<u{max(1, bits // 8)}")


def raw_bytes(tensor: Tensor) -> Tensor:
    """A tensor's memory, row-major, as flat uint8; a view of it if it is contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    # An empty tensor may have strides that its view as bytes cannot.
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8, device="cpu")


def to_symbols(tensor: Tensor, bits: int) -> Symbols:
    """View (copy, for 4 bits) of a tensor as ``bits``-bit symbols, row-major, the lowest bits of an element first.

    :param tensor: any shape, any dtype of :data:`DTYPES`, on the CPU
    :param bits: 4, 8, 16, 32 or 64, at most the element's width
    """
    raw = raw_bytes(tensor).numpy()
    if bits == 4:
        nibbles = np.empty(2 * raw.size, np.uint8)
        nibbles[0::2] = raw & 15
        nibbles[1::2] = raw >> 4
        return nibbles
    symbols: Symbols = raw.view(symbol_dtype(bits))
    return symbols


def from_symbols(symbols: Symbols, bits: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`to_symbols`; shares the symbols' memory unless they are 4-bit."""
    raw = symbols
    if bits == 4:
        raw = np.left_shift(symbols[1::2], 4)
        raw |= symbols[0::2]
    return torch.from_numpy(raw.view(np.uint8)).view(dtype).view(shape)


def count_symbols(tensor: Tensor, bits: int, symbol: int) -> int:
    """How many of a tensor's symbols are this one. Arguments are those of :func:`to_symbols`."""
    raw = raw_bytes(tensor)
    chunks = (to_symbols(raw[start : start + _CHUNK], 8) for start in range(0, raw.numel(), _CHUNK))
    if bits == 4:
        return sum(int(np.count_nonzero(c & 15 == symbol)) + int(np.count_nonzero(c >> 4 == symbol)) for c in chunks)
    return sum(int(np.count_nonzero(chunk.view(symbol_dtype(bits)) == symbol)) for chunk in chunks)


def _negative_zero(dtype: torch.dtype) -> int | None:
    # float8_e8m0fnu has neither sign nor zero.
    signed = dtype.is_floating_point and dtype != torch.float8_e8m0fnu
    return 1 << (8 * dtype.itemsize - 1) if signed else None


def count_negative_zeros(tensor: Tensor) -> int:
    """How many entries are -0.0."""
    symbol = _negative_zero(tensor.dtype)
    return 0 if symbol is None else count_symbols(tensor, 8 * tensor.element_size(), symbol)


def with_positive_zeros(tensor: Tensor) -> Tensor:
    """The tensor with 0.0 for every -0.0; a contiguous copy, if it has any. All other bits are what they were."""
    symbol = _negative_zero(tensor.dtype)
    if symbol is None or not count_negative_zeros(tensor):
        return tensor
    copy = tensor.detach().contiguous().clone()
    symbols = to_symbols(copy, 8 * copy.element_size())
    for start in range(0, symbols.size, _CHUNK):
        chunk = symbols[start : start + _CHUNK]
        chunk[chunk == symbol] = 0
    return copy
