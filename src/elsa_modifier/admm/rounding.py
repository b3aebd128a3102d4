"""Stochastic rounding to bf16: up or down with probabilities that make the expectation the value itself.

An update smaller than half of a bf16 weight's last place would be lost to rounding to the nearest, in every step anew.

Its noise may be keyed: a function of a seed, the step, the tensor and the entry, and of nothing that was drawn before.
Ranks that hold the same entries of a weight then round them alike, and rows are rounded alike whichever rank has them.
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Key",
    "Place",
    "drawn_key",
    "hashed_int16",
    "key_of",
    "keyed_int16",
    "round_stochastically_",
    "rounded_stochastically",
    "uniform_int16",
]

_INT64 = torch.iinfo(torch.int64)
# Entries that one seed draws for. Of a block that is cut by the end of a rank's rows all is drawn.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Place:
    """Where a flat tensor lies among all tensors of a run.

    :param tensor: a number that tells it from the others
    :param offset: the index of its first entry in the whole tensor, if it is a part
    :param entries: of the whole tensor
    """

    tensor: int
    offset: int
    entries: int


class Key(NamedTuple):
    """What hashed noise is a function of, beside the entry: two halves, int32, and the first entry, int64.

    Zero-dimensional tensors in main memory, so that an update is not compiled for each.
    """

    low: Tensor
    high: Tensor
    offset: Tensor


def key_of(key: tuple[int, ...], place: Place, start: int) -> Key:
    """See :func:`hashed_int16`: of the entries from ``start`` on of a tensor.

    :param key: what the numbers depend on beside the entries: seed, step
    """
    mixed = _mixed(*key, place.tensor)
    low, high = (torch.tensor(half - (1 << 31), dtype=torch.int32) for half in (mixed & (2**32 - 1), mixed >> 32))
    return Key(low, high, torch.tensor(place.offset + start))


def drawn_key() -> Key:
    """A key of torch's generator in main memory."""
    drawn = torch.randint(-(1 << 31), 1 << 31, (2,)).to(torch.int32)
    return Key(drawn[0], drawn[1], torch.tensor(0))


def hashed_int16(key: Key, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two numbers over all of int16 for each entry, by a hash of its index: int32 of this shape.

    An accelerator computes them where they are needed, and reads and writes nothing for them. The hash is two rounds of
    a multiplicative one whose bits each depend on every bit of the index.
    """
    index = torch.arange(shape.numel(), device=device).view(shape) + key.offset
    mixed = _hashed(_hashed(index.to(torch.int32) ^ key.low) ^ key.high)
    # The shift of a signed number keeps its sign: the upper half is an int16 as it is.
    return (mixed << 16) >> 16, mixed >> 16


def _hashed(x: Tensor) -> Tensor:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        x = (x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return x ^ ((x >> 16) & 0xFFFF)


@torch.no_grad()
def round_stochastically_(target: Tensor, values: Tensor, noise: Tensor | None = None) -> None:
    """Write fp32 ``values``, which are overwritten, to ``target``, bf16 of the same shape. Values must be finite.

    :param noise: int16, or int32 in its range, of the same shape, uniform over all of int16; None draws it
    """
    target.copy_(rounded_stochastically(values, uniform_int16(values) if noise is None else noise))


def rounded_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """The values, which are overwritten, rounded to what bf16 holds."""
    bits = values.view(torch.int32)
    # Uniform below one unit in bf16's last place: int16 is as uniform, half a unit lower.
    bits.add_(noise).add_(1 << 15)
    return bits.bitwise_and_(-(1 << 16)).view(torch.float32)


def uniform_int16(like: Tensor) -> Tensor:
    """Random numbers over all of int16, in the shape and on the device of another tensor."""
    return _draw(like.numel(), like.device, None).view(like.shape)


def keyed_int16(key: tuple[int, ...], place: Place, start: int, end: int, device: torch.device) -> Tensor:
    """The noise of entries ``start`` to ``end`` of a tensor: (end - start,), a function of its arguments alone.

    In main memory, where drawing is faster than :func:`hashed_int16`.

    :param key: what the numbers depend on beside the entries: seed, step, purpose
    """
    start, end = start + place.offset, end + place.offset
    parts = []
    for first in range(start // _BLOCK * _BLOCK, end, _BLOCK):
        generator = torch.Generator(device).manual_seed(_mixed(*key, place.tensor, first))
        drawn = _draw(min(_BLOCK, place.entries - first), device, generator)
        parts.append(drawn[max(start - first, 0) : end - first])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mixed(*numbers: int) -> int:
    """63 bits that differ in about half if any of the numbers differs in one."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _draw(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    # Four from each 64-bit one: drawing them is what takes most of the time.
    noise = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    return noise.random_(_INT64.min, None, generator=generator).view(torch.int16)[:count]
