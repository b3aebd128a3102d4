"""Packed tensors back to dense ones, what they hold, and whether they can be trusted. Plain torch, any machine.

What is called from outside takes the packed weights of GPUs, too, wherever they lie.
"""

import dataclasses
from typing import TypeAlias

import torch
from torch import Tensor

from elsa_kernels import library
from elsa_kernels.gpu_layout import is_for_gpu, read_gpu_header, unpack_gpu, unpack_gpu_integers
from elsa_kernels.layout import FLOATS, REACH, SEGMENT, SLICE, VALUE_NAMES, Header, Layout, read_header

__all__ = ["PackedInfo", "check", "coordinates", "describe", "unpack", "unpack_integers"]

Coordinates: TypeAlias = tuple[Tensor, Tensor, Tensor]
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
    """"csr", "bitmask" or "window" of CPUs, "gaps" of GPUs."""


def describe(packed: Tensor) -> PackedInfo:
    """What a packed tensor's header says.

    :raises ValueError: if it is no packed tensor, or cut off
    """
    if is_for_gpu(packed):
        return _describe_gpu(packed)
    h = read_header(packed)
    return PackedInfo(
        h.rows, h.columns, VALUE_NAMES[h.values], h.group_size, h.kept, h.nbytes, Layout(h.layout).name.lower()
    )


def _describe_gpu(packed: Tensor) -> PackedInfo:
    h = read_gpu_header(packed)
    offsets = h.part_offsets()
    values = packed[offsets["values"] : offsets["scales"]].clone().view(h.dtype)
    name = next((name for name, dtype in FLOATS.items() if dtype == h.dtype), "int8")
    return PackedInfo(h.rows, h.columns, name, h.group_size, int(values.count_nonzero()), packed.numel(), "gaps")


def check(packed: Tensor) -> None:
    """Pass if every index in a packed tensor is inside it and inside the weight, so that kernels may trust it.

    Values and scales are not looked at: any bits of theirs are numbers.

    :raises ValueError: with what is wrong
    """
    if is_for_gpu(packed):
        unpack_gpu(packed)
        return
    h = read_header(packed)
    if (compiled := library.compiled()) is not None:
        compiled.check(packed)
        return
    rows, columns, _ = coordinates(packed, h)
    _require(
        bool(((rows >= 0) & (rows < h.rows) & (columns >= 0) & (columns < h.columns)).all()), "positions of weights"
    )
    if h.layout != Layout.CSR:  # whose columns ascend
        _require(int(torch.unique(rows * h.columns + columns).numel()) == h.kept, "positions of weights")


def unpack(packed: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight, (rows, columns), on the packed tensor's device.

    :param dtype: of the result; None means that of the values, or fp32 for integers, which are multiplied by their
        scale in fp32
    :raises ValueError: if packed is corrupt
    """
    if is_for_gpu(packed):
        return unpack_gpu(packed).to(dtype)
    check(packed)
    h = read_header(packed)
    if dtype is None:
        dtype = torch.float32 if h.scales else FLOATS[VALUE_NAMES[h.values]]
    if (compiled := library.compiled()) is not None and dtype in FLOATS.values():
        return compiled.unpack(packed, h.rows, h.columns, dtype)
    rows, columns, values = coordinates(packed, h)
    if h.scales:
        values = values.float() * _scales(packed, h)[rows, columns // h.group_size].float()
    dense = torch.zeros(h.rows, h.columns, dtype=dtype)
    dense[rows, columns] = values.to(dense.dtype)
    return dense


def unpack_integers(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The integers and scales of a quantized weight, as ``pack_integers`` took them, on the packed tensor's device.

    :return: (rows, columns) int8, and (rows, groups) floating point
    :raises ValueError: if packed is corrupt, or holds floating point
    """
    if is_for_gpu(packed):
        return unpack_gpu_integers(packed)
    check(packed)
    h = read_header(packed)
    if not h.scales:
        raise ValueError(f"packed has {VALUE_NAMES[h.values]} values; only int8 and int4 come with scales")
    rows, columns, values = coordinates(packed, h)
    integers = torch.zeros(h.rows, h.columns, dtype=torch.int8)
    integers[rows, columns] = values
    return integers, _scales(packed, h)


def coordinates(packed: Tensor, h: Header) -> Coordinates:
    """Row, column and value (integers without their scale) of each kept weight, in the order in which they are stored.

    :raises ValueError: if counts or offsets in the parts contradict each other
    """
    if h.layout == Layout.CSR:
        return _csr(packed, h)
    rows, step_blocks, slots = _slots(packed, h)
    if h.layout == Layout.BITMASK:
        return _bitmask(packed, h, rows, slots)
    return _window(packed, h, rows, step_blocks, slots)


def _csr(packed: Tensor, h: Header) -> Coordinates:
    offsets = h.part(packed, "offsets", torch.int32).long()
    counts = offsets.diff()
    _require(int(offsets[0]) == 0 and int(offsets[-1]) == h.kept and bool((counts >= 0).all()), "offsets of rows")
    rows = torch.repeat_interleave(torch.arange(h.rows), counts)
    if h.columns <= 1 << 16:
        columns = h.part(packed, "columns", torch.int16).long() & 0xFFFF
    else:
        columns = h.part(packed, "columns", torch.int32).long()
    _require(bool((columns.diff()[rows.diff() == 0] > 0).all()), "columns of a row")
    _require(h.value_nbytes == (h.kept * _bits(h) + 7) // 8, "bytes of values")
    if _bits(h) == 4:
        return rows, columns, _nibbles(h.part(packed, "values", torch.uint8)).view(-1)[: h.kept]
    return rows, columns, h.part(packed, "values", _value_dtype(h))


def _slots(packed: Tensor, h: Header) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of kept weights; the block (slices, blocks) of each step; each kept weight's (step, place in its mask)."""
    wide = h.layout == Layout.BITMASK and h.mask_columns == 4
    masks = h.part(packed, "masks", torch.int64 if wide else torch.int32)
    slots = ((masks[:, None] >> torch.arange(64 if wide else 32, dtype=masks.dtype)) & 1).nonzero()
    _require(slots.shape[0] == h.kept, "masks")
    if h.layout == Layout.BITMASK:
        step_blocks = torch.arange(h.slices).repeat_interleave(h.slice_masks)
    else:
        offsets = h.part(packed, "step_offsets", torch.int32).long()
        fits = int(offsets[0]) == 0 and int(offsets[-1]) == h.steps and bool((offsets.diff() >= 0).all())
        _require(fits, "offsets of steps")
        step_blocks = torch.repeat_interleave(torch.arange(h.slices * h.blocks), offsets.diff())
    order = h.part(packed, "order", torch.int32).long()
    _require(torch.equal(order[order != -1].sort().values, torch.arange(h.rows)), "order of rows")
    slices = step_blocks if h.layout == Layout.BITMASK else step_blocks // h.blocks
    rows = order[slices[slots[:, 0]] * SLICE + slots[:, 1] // (4 if wide else 2)]
    _require(bool((rows >= 0).all()), "masks")
    return rows, step_blocks, slots


def _bitmask(packed: Tensor, h: Header, rows: Tensor, slots: Tensor) -> Coordinates:
    width, bit = h.mask_columns, slots[:, 1]
    within = bit % 2 if width == 2 else 2 * (bit % 2) + bit // 2 % 2
    columns = slots[:, 0] % h.slice_masks * width + within
    _require(bool((columns < h.columns).all()), "masks")
    firsts = torch.arange(0, h.slice_masks, SEGMENT // width)
    entries = firsts[None] + torch.arange(h.slices)[:, None] * h.slice_masks
    values, ends, _ = _values_by_mask(packed, h, slots)
    _require_offsets(packed, h, "value_offsets", torch.int64, ends, entries.flatten())
    return rows, columns, values


def _window(packed: Tensor, h: Header, rows: Tensor, step_blocks: Tensor, slots: Tensor) -> Coordinates:
    bases = h.part(packed, "bases", torch.int16).long() & 0xFFFF
    indices = h.part(packed, "indices", torch.uint8).long()
    _require(bool(((bases == 0) | (bases + REACH <= h.columns)).all()), "bases")
    slices = step_blocks // h.blocks
    _require(bool((bases.diff()[slices.diff() == 0] >= 0).all()), "bases")
    columns = bases[slots[:, 0]] + indices
    starts = torch.tensor([*h.boundaries, h.columns])
    block = step_blocks[slots[:, 0]] % h.blocks
    inside = (indices < REACH) & (columns >= starts[block]) & (columns < starts[block + 1])
    _require(bool(inside.all()), "indices")
    by_row = torch.argsort(rows, stable=True)
    _require(bool((columns[by_row].diff()[rows[by_row].diff() == 0] > 0).all()), "indices")
    first_blocks = torch.tensor([b for b, start in enumerate(h.boundaries) if start % SEGMENT == 0])
    first_blocks = (first_blocks[None] + torch.arange(h.slices)[:, None] * h.blocks).flatten()
    entries = h.part(packed, "step_offsets", torch.int32).long()[first_blocks]
    values, byte_ends, kept_ends = _values_by_mask(packed, h, slots)
    _require_offsets(packed, h, "value_offsets", torch.int64, byte_ends, entries)
    _require_offsets(packed, h, "kept_offsets", torch.int32, kept_ends, entries)
    return rows, columns, values


def _values_by_mask(packed: Tensor, h: Header, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, and after how many bytes and values each step starts, (steps + 1,): each starts at a whole byte."""
    counts = torch.bincount(slots[:, 0], minlength=h.steps)
    kept_ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    byte_ends = torch.nn.functional.pad(((counts * _bits(h) + 7) // 8).cumsum(0), (1, 0))
    _require(h.value_nbytes == int(byte_ends[-1]), "bytes of values")
    if _bits(h) != 4:
        return h.part(packed, "values", _value_dtype(h)), byte_ends, kept_ends
    step = slots[:, 0]
    place = torch.arange(h.kept) - kept_ends[step]
    nibbles = _nibbles(h.part(packed, "values", torch.uint8))
    return nibbles[byte_ends[step] + place // 2, place % 2], byte_ends, kept_ends


def _require_offsets(packed: Tensor, h: Header, name: str, dtype: torch.dtype, ends: Tensor, entries: Tensor) -> None:
    expected = torch.cat([ends[entries], ends[-1:]])
    _require(torch.equal(h.part(packed, name, dtype).long(), expected), name.replace("_", " "))


def _scales(packed: Tensor, h: Header) -> Tensor:
    """(rows, groups)"""
    scales = h.part(packed, "scales", SCALE_DTYPES[h.scales])
    if h.layout == Layout.CSR:
        return scales.view(h.rows, h.groups)
    by_lane = scales.view(h.slices, h.groups, SLICE).transpose(1, 2).reshape(-1, h.groups)
    order = h.part(packed, "order", torch.int32).long()
    result = torch.empty(h.rows, h.groups, dtype=scales.dtype)
    result[order[order != -1]] = by_lane[order != -1]
    return result


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
