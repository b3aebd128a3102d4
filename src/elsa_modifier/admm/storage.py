"""A tensor held in few bits an entry, written and read a chunk at a time: ``Q(t) = (round(t / s), s)``.

ELSA-L (arXiv 2510.01650, section 3.4) keeps the ADMM state in such formats, and computes in fp32. The scale ``s`` is
``max|t| / v_max``, of every block of 256 entries: magnitudes differ by orders within a tensor, and one scale for all of
it would leave int8 a few levels for most (docs/results/state_formats.md). The two supports of a state have scales of
their own, since ``z`` and ``u`` live at different magnitudes.
"""

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from elsa_modifier.admm.bitmask import select_by_bits

__all__ = [
    "BLOCK",
    "Scratch",
    "StateDtype",
    "StoredPair",
    "as_float",
    "block_maxima",
    "chunks",
    "padded",
    "scale_blocks_",
]

StateDtype = Literal["fp32", "bf16", "float8_e4m3fn", "float8_e5m2", "int8"]

BLOCK = 256
# Entries that are worked on at once: on a CPU they stay in its cache, elsewhere temporaries stay small.
_CPU_CHUNK = 1 << 18
_CHUNK = 1 << 24

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
    """Start and end of the chunks of a flat tensor; each starts at a whole block."""
    size = _CPU_CHUNK if device.type == "cpu" else _CHUNK
    return [(start, min(start + size, entries)) for start in range(0, entries, size)]


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

    def read(self, start: int, end: int, bits: Tensor, scratch: "Scratch") -> Tensor:
        """Entries ``start`` to ``end`` of the tensor, fp32: a view of the storage or of ``scratch``, to be read only.

        :param bits: the mask of these entries, packed
        """
        codes = self._codes[start:end]
        if codes.dtype == torch.float32:
            return codes
        values = as_float(codes, scratch.stored[: end - start])
        if self._scales:
            scale_blocks_(values, self._entry_scales(start, end, bits, scratch), torch.Tensor.mul_)
        return values

    def write(self, start: int, end: int, values: Tensor, bits: Tensor, scratch: "Scratch") -> None:
        """Store fp32 ``values``, which may be overwritten, as entries ``start`` to ``end``."""
        if self._scales:
            largest = _LARGEST[self._codes.dtype]
            for kind, scale in enumerate(self._scales):
                # One kind alone has zeros for the other.
                of_kind = values
                if len(self._scales) > 1:
                    of_kind = values * select_by_bits(bits, values.shape, float(kind), 1.0 - kind, scratch.selection)
                scale[start // BLOCK : padded(end) // BLOCK] = block_maxima(of_kind) / largest
            scales = self._entry_scales(start, end, bits, scratch)
            scale_blocks_(values, torch.where(scales == 0, 1.0, scales), torch.Tensor.div_)
            if self._codes.dtype == torch.int8:
                values.round_()
        self._codes[start:end].copy_(values)

    def _entry_scales(self, start: int, end: int, bits: Tensor, scratch: "Scratch") -> Tensor:
        """Scales that broadcast to (blocks, BLOCK): (blocks, 1), or (blocks, BLOCK) where there are two kinds."""
        outside, *inside = (scale[start // BLOCK : padded(end) // BLOCK, None] for scale in self._scales)
        if not inside:
            return outside
        is_inside = select_by_bits(bits, torch.Size([8 * bits.numel()]), 1.0, 0.0, scratch.selection)
        padding = padded(end - start) - is_inside.numel()
        is_inside = torch.nn.functional.pad(is_inside, (0, padding)).view(-1, BLOCK)
        return torch.addcmul(outside, is_inside, inside[0] - outside)


class Scratch:
    """fp32 buffers that every weight of a device shares.

    :param largest: entries of the largest weight
    """

    def __init__(self, largest: int, device: torch.device) -> None:
        size = padded(max((end - start for start, end in chunks(largest, device)), default=0))
        self.selection = torch.empty(size, device=device)
        self.stored = torch.empty(size, device=device)
        self.weight = torch.empty(size, device=device)
        self.whole = torch.empty(largest, device=device)


def as_float(codes: Tensor, out: Tensor) -> Tensor:
    """Codes of any of the formats as fp32, written to ``out``."""
    if codes.device.type != "cpu" or codes.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return out.copy_(codes)
    # By way of fp16: a tenth of the time that a CPU takes to convert fp8. e5m2 is the upper half of an fp16; all bits
    # of e4m3 but the sign lie one lower, and mean 2^8 times as much there.
    bits = codes.view(torch.int8).to(torch.int16)
    if codes.dtype == torch.float8_e5m2:
        return out.copy_(bits.bitwise_left_shift_(8).view(torch.float16))
    return out.copy_(bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)).mul_(256.0)


def scale_blocks_(
    values: Tensor, scales: Tensor, scale_: Callable[[Tensor, Tensor], Tensor], block: int = BLOCK
) -> None:
    """``scale_`` (entries,) values in place by (blocks, 1 or ``block``) scales; the last block may be short."""
    whole = values.numel() // block
    scale_(values[: whole * block].view(-1, block), scales[:whole])
    rest = values[whole * block :]
    if rest.numel():
        scale_(rest, scales[whole].expand(block)[: rest.numel()])


def block_maxima(values: Tensor, block: int = BLOCK) -> Tensor:
    """``max|t|`` of every block of a flat tensor, (blocks,); the last block may be short."""
    padding = -values.numel() % block
    return torch.nn.functional.pad(values.abs(), (0, padding)).view(-1, block).amax(dim=1)
