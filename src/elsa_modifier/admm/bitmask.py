"""One bit a weight: boolean masks packed into bytes, and back at memory speed."""

import functools

import torch
from torch import Tensor

from elsa_modifier.admm.placement import is_fused

__all__ = ["count_entered", "pack_bits", "select_by_bits", "unpack_bits"]

# Multiplying eight 0/1 bytes, read as one little-endian integer, by this gathers them in the top byte.
_GATHER_BITS = 0x0102040810204080


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean tensor of any shape, flattened, into uint8: (ceil(n / 8),), bit i of byte j is entry 8j + i."""
    if is_fused(mask.device):
        entries = mask.flatten()
        if entries.numel() % 8:
            entries = torch.nn.functional.pad(entries, (0, -entries.numel() % 8))
        places = torch.arange(8, device=mask.device, dtype=torch.int32)
        return (entries.view(-1, 8).to(torch.int32) << places).sum(dim=1, dtype=torch.int32).to(torch.uint8)
    flat = torch.nn.functional.pad(mask.flatten(), (0, -mask.numel() % 8))
    return (flat.view(torch.int64) * _GATHER_BITS).bitwise_right_shift_(56).to(torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of :func:`pack_bits`: a boolean tensor of ``shape``."""
    if is_fused(bits.device):
        return _bits_of(bits, shape)
    # A table look-up moves eight entries at a time, several times faster than shifting and masking bytes.
    table = _bit_table(bits.device).contiguous().view(torch.int64).squeeze(1)
    return table.index_select(0, bits.to(torch.int32)).view(torch.bool)[: shape.numel()].view(shape)


def select_by_bits(
    bits: Tensor, shape: torch.Size, on: float | Tensor, off: float | Tensor, scratch: Tensor | None = None
) -> Tensor:
    """fp32 tensor of ``shape`` that is ``on`` where the bit is set and ``off`` elsewhere.

    :param on: a number; where updates are compiled perhaps as a zero-dimensional tensor
    :param scratch: fp32 buffer of at least ``8 * len(bits)`` entries to write into, or None to allocate
    """
    if is_fused(bits.device):
        return torch.where(_bits_of(bits, shape), on, off)
    assert not isinstance(on, Tensor) and not isinstance(off, Tensor)
    table = _selection_table(bits.device, on, off)
    out = None if scratch is None else scratch[: 8 * bits.numel()].view(-1, 8)
    rows = torch.index_select(table, 0, bits.to(torch.int32), out=out)
    return rows.view(-1)[: shape.numel()].view(shape)


def count_entered(new: Tensor, old: Tensor) -> Tensor:
    """How many bits are set in ``new`` and not in ``old``: zero-dimensional int64."""
    if is_fused(new.device):
        return _bits_of(new & ~old, torch.Size([8 * new.numel()])).sum()
    counts = _bit_table(new.device).sum(dim=1)
    return counts.index_select(0, (new & ~old).to(torch.int32)).sum()


def _bits_of(bits: Tensor, shape: torch.Size) -> Tensor:
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    entries = ((bits.view(-1, 1) >> places) & 1).view(-1)
    if entries.numel() != shape.numel():
        entries = entries[: shape.numel()]
    return entries.view(shape).to(torch.bool)


# A step asks for the same two values for every weight, the next one perhaps for others.
@functools.lru_cache(maxsize=16)
def _selection_table(device: torch.device, on: float, off: float) -> Tensor:
    """``on`` and ``off`` instead of the eight bits of every byte value: (256, 8), fp32."""
    return torch.where(_bit_table(device), on, off)


@functools.cache
def _bit_table(device: torch.device) -> Tensor:
    """The eight bits of every byte value, least significant first: (256, 8), bool."""
    bits = torch.arange(256).unsqueeze(1).bitwise_right_shift(torch.arange(8)).bitwise_and(1)
    return bits.to(torch.bool).to(device)
