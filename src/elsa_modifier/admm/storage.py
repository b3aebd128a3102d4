"""A tensor held in few bits an entry, written and read in parts: ``Q(t) = (round(t / s), s)``.

ELSA-L (arXiv 2510.01650, section 3.4) keeps the ADMM state in such formats, and computes in fp32. The scale ``s`` is
``max|t| / v_max``, of every block of 256 entries: magnitudes differ by orders within a tensor, and one scale for all of
it would leave int8 a few levels for most (docs/results/state_formats.md). The two supports of a state have scales of
their own, since ``z`` and ``u`` live at different magnitudes.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from elsa_modifier.admm.bitmask import select_by_bits
from elsa_modifier.admm.placement import is_fused

__all__ = [
    "BLOCK",
    "Scratch",
    "StateDtype",
    "Stored",
    "StoredPair",
    "as_float",
    "chunks",
    "in_blocks",
    "padded",
    "read_stored",
    "write_stored",
]

StateDtype = Literal["fp32", "bf16", "float8_e4m3fn", "float8_e5m2", "int8"]

BLOCK = 256
# Entries that are worked on at once in main memory: they stay in a core's cache.
_CPU_CHUNK = 1 << 18

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}


def padded(entries: int, block: int = BLOCK) -> int:
    """``entries``, rounded up to whole blocks."""
    return -(-entries // block) * block


@functools.cache
def chunks(entries: int, device: torch.device) -> list[tuple[int, int]]:
    """Start and end of the parts of a flat tensor that an update works on: whole blocks, and then what is left of one.

    Where updates are compiled the whole blocks are one part.
    """
    whole = entries // BLOCK * BLOCK
    size = max(whole, 1) if is_fused(device) else _CPU_CHUNK
    edges = [(start, min(start + size, whole)) for start in range(0, whole, size)]
    return edges + [(whole, entries)] * (whole < entries)


def in_blocks(part: Tensor, block: int = BLOCK) -> Tensor:
    """A part as :func:`chunks` gives them, flat, as (rows, blocks in a row, entries of a block): a view.

    Every update has its tensors in this shape, in which a scale of each block is (rows, blocks in a row, 1).

    :param block: entries that share a scale; divides ``BLOCK``
    """
    if part.numel() % BLOCK == 0:
        return part.view(-1, BLOCK // block, block)
    return part.view(1, -1, min(block, part.numel()))


class Stored(NamedTuple):
    """A part of a :class:`StoredPair`: views.

    :param codes: as :func:`in_blocks` gives them
    :param scales: of entries outside the mask and, if those inside are stored too, inside: (rows, 1, 1) each
    """

    codes: Tensor
    scales: tuple[Tensor, ...]


class StoredPair:
    """A flat tensor whose entries are of one of two kinds, as a packed mask says, each kind with scales of its own.

    :param entries: of the tensor
    :param both_kinds: whether entries inside the mask are stored as well; otherwise they are zero
    """

    def __init__(self, entries: int, dtype: StateDtype, device: torch.device, *, both_kinds: bool) -> None:
        self._codes = torch.zeros(entries, dtype=_DTYPES[dtype], device=device)
        self._scales: list[Tensor] = []
        if self._codes.dtype in _LARGEST:
            blocks = padded(entries) // BLOCK
            self._scales = [torch.zeros(blocks, device=device) for _ in range(1 + both_kinds)]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._codes.nbytes + sum(scale.nbytes for scale in self._scales)

    @property
    def parts(self) -> dict[str, tuple[Tensor, int]]:
        """The tensors that it is made of, by name, and how many entries each of their elements is for."""
        scales = {f"scale{kind}": (scale, BLOCK) for kind, scale in enumerate(self._scales)}
        return {"codes": (self._codes, 1)} | scales

    def held(self) -> list[Tensor]:
        """For :class:`~elsa_modifier.admm.offloading.Holder`, as :meth:`hold`."""
        return [self._codes, *self._scales]

    def hold(self, tensors: Sequence[Tensor]) -> None:
        self._codes, *self._scales = tensors

    def part(self, start: int, end: int, block: int = BLOCK) -> Stored:
        """Entries ``start`` to ``end``, of which ``block`` are a block of what else is computed with."""
        rows = slice(start // BLOCK, padded(end) // BLOCK)
        codes = in_blocks(self._codes[start:end], block)
        return Stored(codes, tuple(scale[rows].view(-1, 1, 1) for scale in self._scales))


def read_stored(stored: Stored, bits: Tensor, scratch: "Scratch | None") -> Tensor:
    """Its entries, fp32: the storage itself or memory of ``scratch``, to be read only.

    :param bits: the mask of these entries, packed
    """
    codes = stored.codes
    if codes.dtype == torch.float32:
        return codes
    values = as_float(codes, None if scratch is None else scratch.stored)
    return values.mul_(_entry_scales(stored, bits, scratch)) if stored.scales else values


def write_stored(stored: Stored, values: Tensor, bits: Tensor, scratch: "Scratch | None") -> None:
    """Store fp32 ``values``, which may be overwritten."""
    if stored.scales:
        largest = _LARGEST[stored.codes.dtype]
        for kind, scale in enumerate(stored.scales):
            # One kind alone has zeros for the other.
            of_kind = values
            if len(stored.scales) > 1:
                chosen = select_by_bits(bits, values.shape, float(kind), 1.0 - kind, _selection(scratch))
                of_kind = values * chosen
            scale.copy_(of_kind.abs().amax(dim=(1, 2), keepdim=True) / largest)
        scales = _entry_scales(stored, bits, scratch)
        values.div_(torch.where(scales == 0, 1.0, scales))
        if stored.codes.dtype == torch.int8:
            values.round_()
    stored.codes.copy_(values)


def _entry_scales(stored: Stored, bits: Tensor, scratch: "Scratch | None") -> Tensor:
    """Scales that broadcast to the entries."""
    outside, *inside = stored.scales
    if not inside:
        return outside
    is_inside = select_by_bits(bits, stored.codes.shape, 1.0, 0.0, _selection(scratch))
    return torch.addcmul(outside, is_inside, inside[0] - outside)


def _selection(scratch: "Scratch | None") -> Tensor | None:
    return None if scratch is None else scratch.selection


class Scratch:
    """fp32 buffers that every weight in main memory shares: new memory for each chunk would cost as much as its work.

    :param largest: entries of the largest weight
    """

    def __init__(self, largest: int, device: torch.device) -> None:
        size = padded(max((end - start for start, end in chunks(largest, device)), default=0))
        self.selection = torch.empty(size, device=device)
        self.stored = torch.empty(size, device=device)
        self.weight = torch.empty(size, device=device)
        self.whole = torch.empty(largest, device=device)


def as_float(codes: Tensor, buffer: Tensor | None = None) -> Tensor:
    """Codes of any of the formats as fp32, in memory of ``buffer`` or their own."""
    if is_fused(codes.device):
        return codes.float()
    out = torch.empty(codes.shape) if buffer is None else buffer[: codes.numel()].view(codes.shape)
    if codes.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return out.copy_(codes)
    # By way of fp16: a tenth of the time that a CPU takes to convert fp8. e5m2 is the upper half of an fp16; all bits
    # of e4m3 but the sign lie one lower, and mean 2^8 times as much there.
    bits = codes.view(torch.int8).to(torch.int16)
    if codes.dtype == torch.float8_e5m2:
        return out.copy_(bits.bitwise_left_shift_(8).view(torch.float16))
    return out.copy_(bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)).mul_(256.0)
