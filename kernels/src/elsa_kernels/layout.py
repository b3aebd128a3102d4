"""The packed weight: one 1-D uint8 tensor that says itself what it holds.

A header of 16 little-endian int64, then the parts of its layout, each at a multiple of 64 bytes, then 64 zero bytes so
that a kernel may load a whole vector at the end of any part. No part holds an address. Offsets are not stored: they
follow from the header's counts, here and in ``csrc/packed.h``, and the stored total must agree.
"""

import dataclasses
import math
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "REACH", "SEGMENT", "SLICE", "Header", "Layout", "Values", "read_header"]

MAGIC = int.from_bytes(b"ELSASPW1", "little")
ALIGNMENT = 64
HEADER_NBYTES = 128
# Rows that a vector holds, a lane each.
SLICE = 16
# Columns of x that a step of the window layout can reach.
REACH = 64
# Columns between the places where a slice can be entered.
SEGMENT = 4096

Values = Literal["bf16", "fp16", "fp32", "int8", "int4"]
FLOATS: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The codes in the header; csrc/packed.h has the same.
VALUE_CODES: dict[str, int] = {"bf16": 1, "fp16": 2, "fp32": 3, "int8": 4, "int4": 5}
VALUE_NAMES = {code: name for name, code in VALUE_CODES.items()}


class Layout(IntEnum):
    """How the positions of kept weights are stored."""

    CSR = 1
    """Offsets of rows and a column for each kept weight."""
    BITMASK = 2
    """Slices of 16 rows; a bit for each weight of 2 columns (of 4, if integers) in a mask."""
    WINDOW = 3
    """Slices of 16 rows; steps of at most two weights a row, all within 64 columns."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What the first 128 bytes say, in their order after the magic."""

    rows: int
    columns: int
    kept: int
    values: int
    layout: int
    group_size: int
    """Columns that share a scale within a row; 0 where values are floating point."""
    scales: int
    """Code of the scales' dtype; 0 where there are none."""
    steps: int
    """Masks stored: of the window layout, or of the bitmask layout; 0 in CSR."""
    value_nbytes: int
    nbytes: int
    """Of the whole packed tensor."""

    @property
    def slices(self) -> int:
        return -(-self.rows // SLICE)

    @property
    def groups(self) -> int:
        """Scales in a row; 1 where values are floating point."""
        return -(-self.columns // self.group_size) if self.group_size else 1

    @property
    def mask_columns(self) -> int:
        """Columns that a mask of the bitmask layout has bits for: 32 bits for floating point, 64 for integers."""
        return 4 if self.group_size else 2

    @property
    def slice_masks(self) -> int:
        """Masks of a slice in the bitmask layout."""
        return -(-self.columns // self.mask_columns)

    @property
    def segments(self) -> int:
        return -(-self.columns // SEGMENT)

    @property
    def boundaries(self) -> list[int]:
        """Columns where blocks start: multiples of ``group_size`` and of ``SEGMENT``. A step lies in one block."""
        groups = range(0, self.columns, self.group_size) if self.group_size else ()
        return sorted({*range(0, self.columns, SEGMENT), *groups})

    @property
    def blocks(self) -> int:
        if not self.group_size:
            return self.segments
        common = math.lcm(self.group_size, SEGMENT)
        return self.segments + self.groups - -(-self.columns // common)

    def part_sizes(self) -> dict[str, int]:
        """Bytes of each part, in the order in which they are stored."""
        scale_nbytes = {0: 0, 1: 2, 2: 2, 3: 4}[self.scales] * self.groups
        if self.layout == Layout.CSR:
            return {
                "offsets": 4 * (self.rows + 1),
                "columns": (2 if self.columns <= 1 << 16 else 4) * self.kept,
                "values": self.value_nbytes,
                "scales": scale_nbytes * self.rows,
            }
        entries = self.slices * self.segments + 1
        shared = {"order": 4 * SLICE * self.slices, "value_offsets": 8 * entries}
        if self.layout == Layout.BITMASK:
            positions = {"masks": 2 * self.mask_columns * self.steps}
        else:
            positions = {
                "step_offsets": 4 * (self.slices * self.blocks + 1),
                "kept_offsets": 4 * entries,
                "masks": 4 * self.steps,
                "bases": 2 * self.steps,
                "indices": self.kept,
            }
        return shared | positions | {"values": self.value_nbytes, "scales": scale_nbytes * SLICE * self.slices}

    def part_offsets(self) -> dict[str, int]:
        """Where each part starts, and ``end``: the bytes of the whole."""
        offsets, at = {}, HEADER_NBYTES
        for name, size in self.part_sizes().items():
            offsets[name] = at
            at += -(-size // ALIGNMENT) * ALIGNMENT
        return offsets | {"end": at + ALIGNMENT}

    def sized(self) -> "Header":
        """The same with ``nbytes`` worked out."""
        return dataclasses.replace(self, nbytes=self.part_offsets()["end"])

    def build(self, parts: dict[str, Tensor]) -> Tensor:
        """The packed tensor of these parts, contiguous CPU tensors of any dtype."""
        packed = torch.zeros(self.nbytes, dtype=torch.uint8)
        fields = [MAGIC, *dataclasses.astuple(self)]
        header = torch.tensor(fields, dtype=torch.int64).view(torch.uint8)
        packed[: header.numel()] = header
        for name, at in self.part_offsets().items():
            if name in parts and parts[name].numel():
                flat = parts[name].contiguous().view(-1).view(torch.uint8)
                packed[at : at + flat.numel()] = flat
        return packed

    def part(self, packed: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        """A part as elements of a dtype; a copy, so that the packed tensor may lie at any address."""
        at, size = self.part_offsets()[name], self.part_sizes()[name]
        return packed[at : at + size].clone().view(dtype)


def read_header(packed: Tensor) -> Header:
    """The header of a packed tensor, checked against itself and the tensor's size but not against the parts.

    :raises ValueError: if this is no packed tensor, or one that is cut off, or its fields contradict each other
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        raise ValueError(
            f"packed is {tuple(packed.shape)} {packed.dtype}; it must be what pack returned, 1-D, uint8 and contiguous"
        )
    if packed.numel() < HEADER_NBYTES:
        raise ValueError(f"packed has {packed.numel()} bytes, fewer than its header; it was cut off")
    magic, *fields = packed[:HEADER_NBYTES].clone().view(torch.int64).tolist()
    if magic != MAGIC:
        raise ValueError("packed does not start with ELSASPW1; it must be what pack or pack_integers returned")
    header = Header(*fields[: len(dataclasses.fields(Header))])
    problem = _contradiction(header, fields[len(dataclasses.fields(Header)) :], packed.numel())
    if problem:
        raise ValueError(f"packed is corrupt: {problem}; pack the weight again")
    return header


def _contradiction(h: Header, unused: list[int], nbytes: int) -> str | None:
    """What is wrong with a header, if anything; csrc/check.cpp asks the same."""
    quantized = h.values in (VALUE_CODES["int8"], VALUE_CODES["int4"])
    if h.values not in VALUE_NAMES:
        return f"values has code {h.values}"
    if h.layout not in list(Layout):
        return f"layout has code {h.layout}"
    if not (0 < h.rows < 1 << 31 and 0 < h.columns < 1 << 31 and 0 <= h.kept < 1 << 31):
        return f"rows {h.rows}, columns {h.columns}, kept {h.kept}"
    if h.rows * h.columns > 1 << 40:
        return f"{h.rows} x {h.columns} weights"
    if h.kept > h.rows * h.columns:
        return f"{h.kept} weights kept of {h.rows} x {h.columns}"
    if quantized != (h.scales in (1, 2, 3)) or quantized != (1 <= h.group_size <= h.columns) or not 0 <= h.scales <= 3:
        return f"scales have code {h.scales} and group_size {h.group_size}"
    if not quantized and h.group_size:
        return f"group_size is {h.group_size} for floating point"
    if not (0 <= h.steps < 1 << 31 and 0 <= h.value_nbytes < 1 << 40):
        return f"steps {h.steps}, bytes of values {h.value_nbytes}"
    if h.layout == Layout.CSR and h.steps:
        return f"{h.steps} steps in CSR"
    if h.layout == Layout.BITMASK and h.steps != h.slices * h.slice_masks:
        return f"{h.steps} masks for {h.rows} x {h.columns}"
    if h.layout == Layout.BITMASK and quantized and h.group_size < h.columns and h.group_size % 4:
        return f"group_size {h.group_size} splits a mask"
    if h.layout == Layout.WINDOW and h.columns > 1 << 16:
        return f"{h.columns} columns in the window layout"
    if any(unused):
        return "unused fields of the header are not zero"
    expected = h.part_offsets()["end"]
    if h.nbytes != expected or nbytes != expected:
        return f"{nbytes} bytes where the header says {h.nbytes} and its counts come to {expected}"
    return None
