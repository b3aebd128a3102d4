"""Dense weights, or the integers and scales of quantized ones, to packed tensors."""

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from elsa_kernels import library
from elsa_kernels.gpu_layout import pack_for_gpu, pack_integers_for_gpu, takes_gpu_layout
from elsa_kernels.layout import FLOATS, SLICE, VALUE_CODES, Header, Layout, Values
from elsa_kernels.reading import check

__all__ = ["choose_layout", "pack", "pack_integers", "packed_nbytes"]

SCALE_CODES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
_FLOAT_NAMES: dict[torch.dtype, Values] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INTEGER_RANGES = {4: (-8, 7), 8: (-128, 127)}


def pack(
    weight: Tensor, *, values: Values | None = None, group_size: int | None = None, layout: Layout | None = None
) -> Tensor:
    """A dense weight with its zeros left out, as one 1-D uint8 tensor: on the GPU for one there, otherwise on the CPU.

    :param weight: (rows, columns), bf16, fp16 or fp32; zeros of either sign are not stored
    :param values: how kept weights are stored; None keeps the weight's dtype. "int8" and "int4" round to the nearest
        multiple of a scale, the largest magnitude of a row's group of columns over 127 or 7, rounded to fp16 where it
        is in that dtype's range and kept in fp32 otherwise
    :param group_size: columns that share a scale, for integers only; None means the whole row for "int8" and 128 (or
        the whole row, if that is shorter) for "int4"
    :param layout: how positions are stored on a CPU; None chooses what is fast on this machine
    :raises TypeError: if weight is not 2-D of these dtypes, or would be kept in fp32 on a GPU
    :raises ValueError: for values that are not known, a group_size with floating point, or a weight that is not finite
        and to be rounded to integers
    """
    if weight.dim() != 2 or weight.dtype not in FLOATS.values() or weight.numel() == 0:
        raise TypeError(
            f"weight is {tuple(weight.shape)} {weight.dtype}; it must be 2-D, not empty, and {_list(FLOATS)}"
        )
    weight = weight.detach()
    if values is None:
        values = _FLOAT_NAMES[weight.dtype]
    if values in FLOATS:
        if group_size is not None:
            raise ValueError(f"group_size is {group_size} for values {values}; only int8 and int4 have scales")
        weight = weight.to(FLOATS[values])
        return pack_for_gpu(weight) if takes_gpu_layout(weight.device) else _pack(weight.cpu(), None, values, 0, layout)
    if values not in VALUE_CODES:
        raise ValueError(f"values is {values!r}; it must be one of {_list(VALUE_CODES)}")
    columns = weight.shape[1]
    if group_size is None:
        group_size = min(columns, 128) if values == "int4" else columns
    integers, scales = _round(weight, 4 if values == "int4" else 8, group_size)
    return pack_integers(integers, scales, bits=4 if values == "int4" else 8, group_size=group_size, layout=layout)


def pack_integers(
    integers: Tensor, scales: Tensor, *, bits: int, group_size: int | None = None, layout: Layout | None = None
) -> Tensor:
    """A quantized weight ``w = integers * scales`` with its zeros left out, every integer exactly.

    On a GPU integers of 4 bits take 8, scales are fp32, and groups are halved until a power of two divides the columns.

    :param integers: (rows, columns) int8, in [-8, 7] for 4 bits and [-128, 127] for 8
    :param scales: (rows, groups), bf16, fp16 or fp32
    :param bits: 4 or 8
    :param group_size: columns that share a scale; None means columns / groups, rounded up
    :param layout: how positions are stored on a CPU; None chooses what is fast on this machine
    :return: 1-D uint8, on the GPU for integers there, otherwise on the CPU
    :raises TypeError: if the tensors have other dtypes
    :raises ValueError: if shapes do not fit or an integer is outside the range
    """
    if integers.dim() != 2 or integers.dtype != torch.int8 or integers.numel() == 0:
        raise TypeError(f"integers is {tuple(integers.shape)} {integers.dtype}; it must be 2-D, int8 and not empty")
    if scales.dtype not in SCALE_CODES:
        raise TypeError(f"scales is {scales.dtype}; it must be bf16, fp16 or fp32")
    if bits not in INTEGER_RANGES:
        raise ValueError(f"bits is {bits}; it must be 4 or 8")
    rows, columns = integers.shape
    if scales.dim() != 2 or scales.shape[0] != rows or not 1 <= scales.shape[1] <= columns:
        raise ValueError(f"scales is {tuple(scales.shape)} for integers {rows} x {columns}; it must be (rows, groups)")
    groups = scales.shape[1]
    group_size = -(-columns // groups) if group_size is None else group_size
    if not 1 <= group_size <= columns or -(-columns // group_size) != groups:
        raise ValueError(f"group_size {group_size} makes another number of groups of {columns} columns than {groups}")
    integers, scales = integers.detach(), scales.detach()
    low, high = INTEGER_RANGES[bits]
    if int(integers.min()) < low or int(integers.max()) > high:
        found = f"{int(integers.min())} to {int(integers.max())}"
        raise ValueError(f"integers are {found}; {bits} bits hold {low} to {high}")
    if takes_gpu_layout(integers.device):
        return pack_integers_for_gpu(integers, _scales_of_gpu(scales, columns, group_size))
    return _pack(integers.cpu(), scales.cpu(), "int4" if bits == 4 else "int8", group_size, layout)


def _scales_of_gpu(scales: Tensor, columns: int, group_size: int) -> Tensor:
    """The same scales for groups that the layout of GPUs has: all of one size, and that a power of two if several."""
    if scales.shape[1] == 1:
        return scales
    common = math.gcd(group_size, columns)
    smaller = common & -common
    return scales.repeat_interleave(group_size // smaller, 1)[:, : columns // smaller]


def choose_layout(rows: int, columns: int, kept: int, values: Values, group_size: int = 0) -> Layout:
    """The layout that pack chooses on this machine; the crossovers were measured: docs/kernels.md."""
    has_bitmask, has_window = _has_bitmask(columns, group_size), columns <= MOST_WINDOW_COLUMNS
    density = kept / (rows * columns)
    backend = library.backend()
    if not backend.startswith("avx512"):
        return Layout.CSR
    if not (has_bitmask and has_window):
        return Layout.BITMASK if has_bitmask else Layout.WINDOW if has_window else Layout.CSR
    if density > (WINDOW_DENSITY_AMX if "amx" in backend else WINDOW_DENSITY)[values]:
        return Layout.BITMASK
    # Steps of small weights are far from full.
    window, bitmask = (
        packed_nbytes(rows, columns, kept, values, group_size, layout) for layout in (Layout.WINDOW, Layout.BITMASK)
    )
    return Layout.WINDOW if window <= MOST_FOR_SPEED * bitmask else Layout.BITMASK


def packed_nbytes(
    rows: int, columns: int, kept: int, values: Values, group_size: int = 0, layout: Layout | None = None
) -> int:
    """Bytes of the packed tensor of a weight of this shape with so many weights kept, without packing it.

    Exact for the CSR layout, and for bitmask where values are not int4. Otherwise an estimate for zeros that are spread
    at random, within 10%; positions that cluster take more steps, and rows of very different counts too. Scales are
    taken to be fp16.

    :param group_size: as pack's, 0 for floating point
    """
    layout = choose_layout(rows, columns, kept, values, group_size) if layout is None else layout
    scale_code = SCALE_CODES[torch.float16] if group_size else 0
    header = _header(layout, rows, columns, kept, values, group_size, scale_code)
    if layout == Layout.WINDOW:
        steps = _expected_steps(header)
        padding = steps // 4 if values == "int4" else 0
    elif layout == Layout.BITMASK:
        # Half of the masks have an odd number of weights, if they have many.
        steps, padding = header.steps, min(header.steps // 4, kept // 2) if values == "int4" else 0
    else:
        return header.nbytes
    value_nbytes = header.value_nbytes + padding
    return _header(layout, rows, columns, kept, values, group_size, scale_code, steps, value_nbytes).nbytes


# What part of a step's 32 places is filled, by density: measured on random masks of 512 x 4096.
_FILLED = (
    (0.003, 0.127), (0.01, 0.297), (0.02, 0.445), (0.03, 0.538), (0.05, 0.657), (0.1, 0.794), (0.2, 0.895), (0.5, 0.966)
)  # fmt: skip


def _expected_steps(header: Header) -> int:
    density = header.kept / (header.rows * header.columns)
    filled = _FILLED[0][1] if density < _FILLED[0][0] else _FILLED[-1][1]
    for (low, filled_low), (high, filled_high) in itertools.pairwise(_FILLED):
        if low <= density < high:
            filled = filled_low + (filled_high - filled_low) * math.log(density / low) / math.log(high / low)
    # The last step of a block is on average half empty.
    return int(header.kept / (32 * filled)) + header.slices * header.blocks // 2


MOST_WINDOW_COLUMNS = 1 << 16
# Denser weights are faster as bitmasks. Without AMX windows are faster over a wide range in which they take more
# memory; they are let to take a quarter more.
MOST_FOR_SPEED = 1.25
WINDOW_DENSITY: dict[str, float] = {"bf16": 0.22, "fp16": 0.12, "fp32": 0.12, "int8": 0.16, "int4": 0.16}
WINDOW_DENSITY_AMX: dict[str, float] = {"bf16": 0.12, "fp16": 0.12, "fp32": 0.12, "int8": 0.15, "int4": 0.15}


def _pack(stored: Tensor, scales: Tensor | None, values: Values, group_size: int, layout: Layout | None) -> Tensor:
    """``stored``: (rows, columns), what is kept where it is not zero."""
    stored = stored.contiguous()
    if layout is None:
        rows, columns = stored.shape
        layout = choose_layout(rows, columns, int(torch.count_nonzero(stored)), values, group_size)
    if layout == Layout.CSR:
        packed = _pack_csr(stored, scales, values, group_size)
    else:
        packed = _pack_slices(stored, scales, values, group_size, layout)
    check(packed)
    return packed


def _pack_slices(stored: Tensor, scales: Tensor | None, values: Values, group_size: int, layout: Layout) -> Tensor:
    compiled = library.compiled()
    if compiled is None:
        raise ValueError(f"layout is {layout.name.lower()}, which the compiled library packs; without it there is csr")
    rows, columns = stored.shape
    if layout == Layout.BITMASK and not _has_bitmask(columns, group_size):
        raise ValueError(
            f"group_size is {group_size}; in the bitmask layout it must be a multiple of 4, or all columns"
        )
    if layout == Layout.WINDOW and columns > MOST_WINDOW_COLUMNS:
        raise ValueError(f"weight has {columns} columns; the window layout has at most {MOST_WINDOW_COLUMNS}")
    lanes = -(-rows // SLICE) * SLICE
    order = torch.full((lanes,), -1, dtype=torch.int32)
    order[:rows] = _order(stored)
    counts = compiled.pack_count(stored, VALUE_CODES[values], layout, group_size, order)
    steps, kept, value_nbytes = counts.sum(0).tolist()
    scale_code = SCALE_CODES[scales.dtype] if scales is not None else 0
    header = _header(layout, rows, columns, kept, values, group_size, scale_code, steps, value_nbytes)
    parts = {}
    if scales is not None:
        by_lane = torch.zeros(lanes, scales.shape[1], dtype=scales.dtype)
        by_lane[order != -1] = scales[order[order != -1].long()]
        parts["scales"] = by_lane.view(-1, SLICE, scales.shape[1]).transpose(1, 2)
    packed = header.build(parts)
    compiled.pack_store(stored, order, counts.cumsum(0) - counts, packed)
    return packed


def _has_bitmask(columns: int, group_size: int) -> bool:
    """A group that splits a mask would put two scales into a vector."""
    return group_size in (0, columns) or group_size % 4 == 0


def _order(stored: Tensor) -> Tensor:
    """The rows in the order in which they fill slices: by their number of weights, where those differ a lot.

    A slice takes as many steps as its fullest row needs.
    """
    counts = torch.count_nonzero(stored, 1).float()
    if float(counts.std(correction=0)) <= UNEVEN * float(counts.mean()):
        return torch.arange(stored.shape[0], dtype=torch.int32)
    return torch.argsort(counts, descending=True, stable=True).to(torch.int32)


# Standard deviation of the rows' numbers of weights, in means, from which rows are sorted.
UNEVEN = 0.25


def _header(
    layout: Layout,
    rows: int,
    columns: int,
    kept: int,
    values: Values,
    group_size: int,
    scale_code: int,
    steps: int | None = None,
    value_nbytes: int | None = None,
) -> Header:
    bits = {"bf16": 16, "fp16": 16, "fp32": 32, "int8": 8, "int4": 4}[values]
    slices = -(-rows // SLICE)
    if steps is None:
        steps = {
            Layout.CSR: 0,
            Layout.BITMASK: slices * -(-columns // (4 if group_size else 2)),
            Layout.WINDOW: -(-kept // 26),
        }[layout]
    return Header(
        rows=rows,
        columns=columns,
        kept=kept,
        values=VALUE_CODES[values],
        layout=layout,
        group_size=group_size,
        scales=scale_code,
        steps=steps,
        value_nbytes=(kept * bits + 7) // 8 if value_nbytes is None else value_nbytes,
        nbytes=0,
    ).sized()


def _pack_csr(stored: Tensor, scales: Tensor | None, values: Values, group_size: int) -> Tensor:
    rows, columns = stored.shape
    # A position takes 16 bytes until it is shortened, so only those of some rows exist at a time.
    parts_of_rows = stored.split(max(1, CSR_WEIGHTS_AT_ONCE // columns))
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(torch.cat([torch.count_nonzero(part, 1) for part in parts_of_rows]), 0, out=offsets[1:])
    kept = int(offsets[-1])
    kept_values = torch.empty(kept, dtype=stored.dtype)
    positions = torch.empty(kept, dtype=torch.int32 if columns > 1 << 16 else torch.int16)
    at = 0
    for part in parts_of_rows:
        row, column = part.nonzero(as_tuple=True)
        end = at + column.numel()
        kept_values[at:end] = part[row, column]
        # uint16 tensors lack most operations; int16 of the same bits does not.
        positions[at:end] = column if columns > 1 << 16 else _int16_bits(column)
        at = end
    if values == "int4":
        codes = torch.nn.functional.pad((kept_values + 8).to(torch.uint8), (0, kept % 2))
        kept_values = codes[0::2] | (codes[1::2] << 4)
    scale_code = SCALE_CODES[scales.dtype] if scales is not None else 0
    header = _header(Layout.CSR, rows, columns, kept, values, group_size, scale_code)
    parts = {"offsets": offsets.to(torch.int32), "columns": positions, "values": kept_values}
    return header.build(parts if scales is None else parts | {"scales": scales})


CSR_WEIGHTS_AT_ONCE = 1 << 20


def _int16_bits(positions: Tensor) -> Tensor:
    return torch.where(positions >= 1 << 15, positions - (1 << 16), positions).to(torch.int16)


def _round(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Integers (rows, columns) and scales (rows, groups) of a weight."""
    if not torch.isfinite(weight).all():
        raise ValueError("weight has values that are not finite; they have no integers")
    rows, columns = weight.shape
    if not 1 <= group_size <= columns:
        raise ValueError(f"group_size is {group_size}; it must be 1 to {columns}, the columns")
    groups = -(-columns // group_size)
    largest = INTEGER_RANGES[bits][1]
    padded = torch.nn.functional.pad(weight.float(), (0, groups * group_size - columns)).view(rows, groups, group_size)
    scales = padded.abs().amax(-1) / largest
    positive = scales[scales > 0]
    fp16 = torch.finfo(torch.float16)
    if not positive.numel() or (positive.min() >= fp16.smallest_normal and positive.max() <= fp16.max):
        scales = scales.half()
    divisors = torch.where(scales > 0, scales, 1).float()
    integers = (padded / divisors[..., None]).round().clamp(-largest, largest).to(torch.int8)
    return integers.view(rows, -1)[:, :columns].contiguous(), scales


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
