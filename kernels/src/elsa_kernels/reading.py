"""Packed tensors back to dense ones, what they hold, and whether they can be trusted. Plain torch, any machine."""

import dataclasses

import torch
from torch import Tensor

from elsa_kernels.layout import FLOATS, SLICE, VALUE_NAMES, WINDOW, Header, Layout, read_header

__all__ = ["PackedInfo", "check", "coordinates", "describe", "unpack"]

SCALE_DTYPES = {1: torch.bfloat16, 2: torch.float16, 3: torch.float32}


@dataclasses.dataclass(frozen=True)
class PackedInfo:
    """What a packed tensor holds."""

    rows: int
    columns: int
    values: str
    """"bf16", "fp16", "fp32", "int8" or "int4"."""
    group_size: int
    """Columns that share a scale; 0 where values are floating point."""
    kept: int
    """Weights stored."""
    nbytes: int
    layout: str
    """"csr", "bitmask" or "window"."""


def describe(packed: Tensor) -> PackedInfo:
    """What a packed tensor's header says.

    :raises ValueError: if it is no packed tensor, or cut off
    """
    h = read_header(packed)
    return PackedInfo(
        h.rows, h.columns, VALUE_NAMES[h.values], h.group_size, h.kept, h.nbytes, Layout(h.layout).name.lower()
    )


def check(packed: Tensor) -> None:
    """Pass if every index in a packed tensor is inside it and inside the weight, so that kernels may trust it.

    Values and scales are not looked at: any bits of theirs are numbers.

    :raises ValueError: with what is wrong
    """
    h = read_header(packed)
    rows, columns, _ = coordinates(packed, h)
    inside = (rows >= 0) & (rows < h.rows) & (columns >= 0) & (columns < h.columns)
    if not bool(inside.all()):
        raise ValueError(f"packed is corrupt: a kept weight lies outside of {h.rows} x {h.columns}; pack it again")
    flat = rows * h.columns + columns
    if flat.numel() > 1 and torch.unique(flat).numel() != flat.numel():
        raise ValueError("packed is corrupt: two values for one weight; pack it again")


def unpack(packed: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight, (rows, columns).

    :param dtype: of the result; None means that of the values, or fp32 for integers, which are multiplied by their
        scale in fp32
    :raises ValueError: if packed is corrupt
    """
    h = read_header(packed)
    rows, columns, values = coordinates(packed, h)
    if h.scales:
        values = values.float() * _scales(packed, h)[rows, columns // h.group_size].float()
    dense = torch.zeros(h.rows, h.columns, dtype=values.dtype if dtype is None else dtype)
    dense[rows, columns] = values.to(dense.dtype)
    return dense


def coordinates(packed: Tensor, h: Header) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and value (integers without their scale) of each kept weight, in the order in which they are stored.

    :raises ValueError: if counts or offsets in the parts contradict each other
    """
    return _csr(packed, h)


def _csr(packed: Tensor, h: Header) -> tuple[Tensor, Tensor, Tensor]:
    offsets = h.part(packed, "offsets", torch.int32).long()
    counts = offsets.diff()
    _require(int(offsets[0]) == 0 and int(offsets[-1]) == h.kept and bool((counts >= 0).all()), "offsets of rows")
    rows = torch.repeat_interleave(torch.arange(h.rows), counts)
    if h.columns <= 1 << 16:
        columns = h.part(packed, "columns", torch.int16).long() & 0xFFFF
    else:
        columns = h.part(packed, "columns", torch.int32).long()
    _require(h.value_nbytes == (h.kept * _bits(h) + 7) // 8, "bytes of values")
    if _bits(h) == 4:
        values = _nibbles(h.part(packed, "values", torch.uint8)).view(-1)[: h.kept]
    else:
        values = h.part(packed, "values", _value_dtype(h))
    return rows, columns, values


def _scales(packed: Tensor, h: Header) -> Tensor:
    """(rows, groups)"""
    scales = h.part(packed, "scales", SCALE_DTYPES[h.scales])
    return scales.view(h.rows, h.groups)


def _nibbles(stored: Tensor) -> Tensor:
    """(bytes, 2) int8: the lower half of a byte first, stored with 8 added."""
    return torch.stack([stored & 15, stored >> 4], -1).to(torch.int8) - 8


def _bits(h: Header) -> int:
    return {"bf16": 16, "fp16": 16, "fp32": 32, "int8": 8, "int4": 4}[VALUE_NAMES[h.values]]


def _value_dtype(h: Header) -> torch.dtype:
    return FLOATS.get(VALUE_NAMES[h.values], torch.int8)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"packed is corrupt: {what} do not fit; pack the weight again")
