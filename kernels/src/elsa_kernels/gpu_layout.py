"""The packed weight of GPUs: compressed rows with the gaps between kept columns in 4 bits.

One 1-D uint8 tensor that says itself what it holds, as the packed weight of CPUs is; its magic tells the two apart. A
header of 16 little-endian int32, then the parts, each at a multiple of 16 bytes:

==============  =====================================================================================================
part            what
==============  =====================================================================================================
``row_starts``  int32, rows + 1: where each row's slots start, in blocks of 16 slots
``gaps``        4 bits a slot, the even slot of a pair in the low half of its byte: columns skipped before this one
``values``      a slot's bf16, fp16 or int8
``scales``      int8 only: fp32, (rows, groups), a group being ``group_size`` columns
==============  =====================================================================================================

The column of a row's slot is that of the slot before it, or -1, plus 1 plus the gap. Where more than 15 columns are
skipped, slots of gap 15 and value 0 lie between; the same slots fill each row up to a whole block.

Positions are gaps rather than a bitmask because work is then in proportion to what is kept, not to the columns, because
all lanes load slots of one width next to each other, and because from 80% zeros on gaps are the smaller of the two.

Header: magic (two words), rows, columns, code of the values' dtype, group_size, its binary logarithm, groups, blocks of
slots, offsets of gaps, values and scales in units of 16 bytes, zeros. Kernels read it on the device, so that nothing is
read from there on the host while a model runs.
"""

import dataclasses

import torch
from torch import Tensor

__all__ = [
    "GpuHeader",
    "is_for_gpu",
    "pack_for_gpu",
    "pack_integers_for_gpu",
    "read_gpu_header",
    "takes_gpu_layout",
    "unpack_gpu",
    "unpack_gpu_integers",
]

# Types of devices whose kernels take this layout; torch calls AMD's GPUs "cuda", too.
GPU_DEVICES = frozenset({"cuda"})

MAGIC = int.from_bytes(b"ELSAGAP1", "little")
HEADER_NBYTES = 64
# Slots that a row is filled up to a multiple of, and bytes that a part is: what lets a lane load 16 bytes at once.
BLOCK_SLOTS = 16
ALIGNMENT = 16
LARGEST_GAP = 15
# Columns times tokens are worked out in 32 bits by the kernels.
COLUMNS_LIMIT = 1 << 24
# The codes of the CPU layouts.
VALUE_CODES = {torch.bfloat16: 1, torch.float16: 2, torch.int8: 4}
VALUE_DTYPES = {code: dtype for dtype, code in VALUE_CODES.items()}
# A row's scale is that of column >> 31, the 0th, where it is the only one.
WHOLE_ROW_SHIFT = 31
# Weights looked at in one go while packing, which takes some 50 bytes for each of them.
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class GpuHeader:
    """What a packed weight says of itself."""

    rows: int
    columns: int
    dtype: torch.dtype
    """Of the values: bfloat16, float16 or int8."""
    group_size: int
    """Columns that share a scale; 0 where values are floating point."""
    blocks: int
    """Of 16 slots."""

    @property
    def groups(self) -> int:
        """Scales in a row; 0 where values are floating point."""
        return -(-self.columns // self.group_size) if self.group_size else 0

    def part_offsets(self) -> dict[str, int]:
        """Byte at which each part starts, and ``end``: the bytes of the whole."""
        slots = BLOCK_SLOTS * self.blocks
        sizes = {
            "row_starts": 4 * (self.rows + 1),
            "gaps": slots // 2,
            "values": slots * self.dtype.itemsize,
            "scales": 4 * self.rows * self.groups,
        }
        offsets, at = {}, HEADER_NBYTES
        for name, size in sizes.items():
            offsets[name] = at
            at += -(-size // ALIGNMENT) * ALIGNMENT
        return offsets | {"end": at}

    def words(self) -> Tensor:
        """The header as it is stored, int32."""
        offsets = self.part_offsets()
        shift = WHOLE_ROW_SHIFT if self.groups <= 1 else self.group_size.bit_length() - 1
        fields = [self.rows, self.columns, VALUE_CODES[self.dtype], self.group_size, shift, self.groups, self.blocks]
        fields += [offsets[name] // ALIGNMENT for name in ("gaps", "values", "scales")]
        magic = [MAGIC & 0xFFFFFFFF, MAGIC >> 32]
        return torch.tensor(magic + fields + [0] * (HEADER_NBYTES // 4 - 2 - len(fields)), dtype=torch.int32)


def takes_gpu_layout(device: torch.device) -> bool:
    """Whether a device's kernels take weights that are packed as here; those of a CPU take the other layout."""
    return device.type in GPU_DEVICES


def is_for_gpu(packed: Tensor) -> bool:
    """Whether a tensor begins as packed weights of GPUs do. Reads its first bytes, so not in a step."""
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < HEADER_NBYTES:
        return False
    return int(packed[:8].cpu().clone().view(torch.int64)) == MAGIC


def pack_for_gpu(weight: Tensor) -> Tensor:
    """A dense weight with its zeros left out, for the GPU kernels, which have not yet been run on a GPU.

    :param weight: (rows, columns) bf16 or fp16, on any device; zeros of either sign are not stored
    :return: 1-D uint8, on the weight's device
    :raises TypeError: if weight is not 2-D of these dtypes, or empty
    """
    _check_matrix(weight, "weight", (torch.bfloat16, torch.float16))
    return _pack(weight.detach(), 0, None)


def pack_integers_for_gpu(integers: Tensor, scales: Tensor) -> Tensor:
    """A quantized weight ``w = integers * scales`` with its zeros left out, for the GPU kernels, not yet run on a GPU.

    :param integers: (rows, columns) int8, on any device
    :param scales: (rows, groups) floating point, stored in fp32; a group has columns / groups columns, which must be a
        power of two unless there is one group
    :return: 1-D uint8, on the integers' device
    :raises TypeError: if integers are not 2-D int8, or empty
    :raises ValueError: for other scales
    """
    _check_matrix(integers, "integers", (torch.int8,))
    rows, columns = integers.shape
    if not scales.is_floating_point() or scales.dim() != 2 or scales.shape[0] != rows or not scales.shape[1]:
        raise ValueError(
            f"scales are {tuple(scales.shape)} {scales.dtype}; they must be floating point of ({rows}, groups)"
        )
    groups = scales.shape[1]
    group_size = columns // groups
    if group_size * groups != columns or not _shiftable(group_size, groups):
        raise ValueError(f"scales have {groups} groups for {columns} columns; allowed are 1, or groups of 1, 2, 4, ...")
    return _pack(integers.detach(), group_size, scales.detach().to(integers.device, torch.float32))


def _check_matrix(weight: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if weight.dim() != 2 or weight.dtype not in dtypes or not weight.numel() or weight.shape[1] > COLUMNS_LIMIT:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{name} is {tuple(weight.shape)} {weight.dtype}; it must be 2-D, not empty, {allowed}, and have at most "
            f"{COLUMNS_LIMIT} columns"
        )


def _shiftable(group_size: int, groups: int) -> bool:
    """Whether kernels find a column's group by a shift."""
    return groups == 1 or group_size & (group_size - 1) == 0


def _pack(weight: Tensor, group_size: int, scales: Tensor | None) -> Tensor:
    rows, columns = weight.shape
    pieces = [_slots_of(chunk) for chunk in weight.split(max(1, _CHUNK // columns))]
    gaps, values, row_blocks = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    row_starts = torch.cat([row_blocks.new_zeros(1), row_blocks.cumsum(0)])
    header = GpuHeader(rows, columns, weight.dtype, group_size, int(row_starts[-1]))
    offsets = header.part_offsets()
    packed = torch.zeros(offsets["end"], dtype=torch.uint8, device=weight.device)
    parts = {"row_starts": row_starts.int(), "gaps": gaps[0::2] | gaps[1::2] << 4, "values": values}
    if scales is not None:
        parts["scales"] = scales.contiguous()
    packed[:HEADER_NBYTES] = header.words().to(packed.device).view(torch.uint8)
    for name, part in parts.items():
        raw = part.view(-1).view(torch.uint8)
        packed[offsets[name] : offsets[name] + raw.numel()] = raw
    return packed


def _slots_of(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gaps (uint8) and values of all slots of some rows, one after another, and how many blocks each row has."""
    # NaN differs from 0 and is kept.
    row, column = (weight != 0).nonzero(as_tuple=True)
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    before = torch.where(first, -1, column.roll(1))
    skipped = column - before - 1
    slots = 1 + skipped // (LARGEST_GAP + 1)
    row_slots = torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device).index_add_(0, row, slots)
    row_blocks = (row_slots + BLOCK_SLOTS - 1) // BLOCK_SLOTS
    start = BLOCK_SLOTS * (row_blocks.cumsum(0) - row_blocks)
    unfilled = row_slots.cumsum(0) - row_slots
    at = slots.cumsum(0) - 1 - unfilled[row] + start[row]
    count = BLOCK_SLOTS * int(row_blocks.sum())
    gaps = torch.full((count,), LARGEST_GAP, dtype=torch.uint8, device=weight.device)
    gaps[at] = (skipped % (LARGEST_GAP + 1)).to(torch.uint8)
    values = torch.zeros(count, dtype=weight.dtype, device=weight.device)
    values[at] = weight[row, column]
    return gaps, values, row_blocks


def read_gpu_header(packed: Tensor) -> GpuHeader:
    """The header, checked against itself, the tensor's size and the row starts: what kernels rely on.

    Reads the device, so call it where a weight is loaded, never in a step.

    :raises ValueError: if this is not what ``pack_for_gpu`` or ``pack_integers_for_gpu`` returned
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        raise ValueError(
            f"packed is {tuple(packed.shape)} {packed.dtype}; it must be what pack_for_gpu returned, 1-D, uint8 and "
            "contiguous"
        )
    if packed.numel() < HEADER_NBYTES:
        raise ValueError(f"packed has {packed.numel()} bytes, fewer than its header; it was cut off")
    words = packed[:HEADER_NBYTES].cpu().clone().view(torch.int32)
    if int(words[:2].clone().view(torch.int64)) != MAGIC:
        raise ValueError("packed does not start with ELSAGAP1; it must be what pack_for_gpu returned")
    rows, columns, code, group_size, _, _, blocks = words[2:9].tolist()
    header = GpuHeader(rows, columns, VALUE_DTYPES.get(code, torch.bool), group_size, blocks)
    problem = _contradiction(header, words, packed)
    if problem:
        raise ValueError(f"packed is corrupt: {problem}; pack the weight again")
    return header


def _contradiction(h: GpuHeader, words: Tensor, packed: Tensor) -> str | None:
    """What is wrong with a packed weight of this header, if anything."""
    if min(h.rows, h.columns) < 1 or h.columns > COLUMNS_LIMIT or min(h.group_size, h.blocks) < 0:
        return f"rows {h.rows}, columns {h.columns}, group_size {h.group_size}, blocks {h.blocks}"
    if h.dtype not in VALUE_CODES or bool(h.group_size) != (h.dtype == torch.int8):
        return f"values have code {int(words[4])} and group_size {h.group_size}"
    if h.group_size and (h.columns % h.group_size or not _shiftable(h.group_size, h.groups)):
        return f"group_size {h.group_size} for {h.columns} columns"
    if packed.numel() != h.part_offsets()["end"]:
        return f"{packed.numel()} bytes where its header's counts come to {h.part_offsets()['end']}"
    if not torch.equal(words, h.words()):
        return f"fields of the header, {words[2:].tolist()}, contradict each other"
    starts = _part(packed, h, "row_starts").view(torch.int32)[: h.rows + 1]
    if int(starts[0]) or int(starts[-1]) != h.blocks or bool((starts.diff() < 0).any()):
        return "its rows do not follow one another"
    return None


def _part(packed: Tensor, header: GpuHeader, name: str) -> Tensor:
    """A copy, which may be viewed as any dtype wherever ``packed`` lies."""
    offsets = header.part_offsets()
    names = list(offsets)
    return packed[offsets[name] : offsets[names[names.index(name) + 1]]].clone()


def unpack_gpu(packed: Tensor) -> Tensor:
    """The dense weight, by torch alone and on the packed tensor's device; int8 comes multiplied by its scales, in fp32.

    :return: (rows, columns) bfloat16, float16, or float32 for int8
    :raises ValueError: if this is no packed weight
    """
    header = read_gpu_header(packed)
    if not header.group_size:
        return _unpack_values(packed, header)
    integers, scales = unpack_gpu_integers(packed)
    return integers.float() * scales.repeat_interleave(header.group_size, dim=1)


def unpack_gpu_integers(packed: Tensor) -> tuple[Tensor, Tensor]:
    """A packed weight of integers as ``pack_integers_for_gpu`` took it, on the packed tensor's device.

    :return: (rows, columns) int8, and (rows, groups) float32
    :raises ValueError: if this is no packed weight, or one of floating point
    """
    header = read_gpu_header(packed)
    if not header.group_size:
        raise ValueError(f"packed has values of {header.dtype}; only int8 comes with scales")
    scales = _part(packed, header, "scales").view(torch.float32)[: header.rows * header.groups]
    return _unpack_values(packed, header), scales.view(header.rows, header.groups)


def _unpack_values(packed: Tensor, header: GpuHeader) -> Tensor:
    """(rows, columns) of the dtype of the values, without scales."""
    starts = BLOCK_SLOTS * _part(packed, header, "row_starts").view(torch.int32)[: header.rows + 1].long()
    raw = _part(packed, header, "gaps")[: BLOCK_SLOTS * header.blocks // 2]
    gaps = torch.stack([raw & 15, raw >> 4], dim=1).view(-1).long()
    values = _part(packed, header, "values").view(header.dtype)[: gaps.numel()]
    row = torch.repeat_interleave(torch.arange(header.rows, device=packed.device), starts.diff())
    after = torch.cat([starts.new_zeros(1), (gaps + 1).cumsum(0)])
    column = after[1:] - after[starts[row]] - 1
    holds = values != 0
    row, column = row[holds], column[holds]
    if bool((column >= header.columns).any()):
        raise ValueError("packed is corrupt: gaps lead past the last column; pack the weight again")
    dense = torch.zeros(header.rows, header.columns, dtype=header.dtype, device=packed.device)
    dense[row, column] = values[holds]
    return dense
