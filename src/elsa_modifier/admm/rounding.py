"""Stochastic rounding to bf16: up or down with probabilities that make the expectation the value itself.

An update smaller than half of a bf16 weight's last place would be lost to rounding to the nearest, in every step anew.

Its noise may be keyed: a function of a seed, the step, the tensor and the entry, and of nothing that was drawn before.
Ranks that hold the same entries of a weight then round them alike, and rows are rounded alike whichever rank has them.
"""

import hashlib
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Place", "keyed_int16", "round_stochastically_", "uniform_int16"]

_INT64 = torch.iinfo(torch.int64)
# Entries that one seed draws for. Of a block that is cut by the end of a rank's rows all is drawn.
_CPU_BLOCK = 1 << 16
_BLOCK = 1 << 20


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


@torch.no_grad()
def round_stochastically_(target: Tensor, values: Tensor, noise: Tensor | None = None) -> None:
    """Write fp32 ``values``, which are overwritten, to ``target``, bf16 of the same shape. Values must be finite.

    :param noise: int16 of the same shape, uniform over all of int16; None draws it
    """
    bits = values.view(torch.int32)
    # Uniform below one unit in bf16's last place: int16 is as uniform, half a unit lower.
    bits.add_(uniform_int16(values) if noise is None else noise).add_(1 << 15)
    bits.bitwise_and_(-(1 << 16))
    target.copy_(values)


def uniform_int16(like: Tensor) -> Tensor:
    """Random numbers over all of int16, in the shape and on the device of another tensor."""
    return _draw(like.numel(), like.device, None).view(like.shape)


def keyed_int16(key: tuple[int, ...], place: Place, start: int, end: int, device: torch.device) -> Tensor:
    """The noise of entries ``start`` to ``end`` of a tensor: (end - start,), a function of its arguments alone.

    Which devices draw the same numbers is not said: ranks have devices of one kind.

    :param key: what the numbers depend on beside the entries: seed, step, purpose
    """
    block = _CPU_BLOCK if device.type == "cpu" else _BLOCK
    start, end = start + place.offset, end + place.offset
    parts = []
    for first in range(start // block * block, end, block):
        generator = torch.Generator(device).manual_seed(_mixed(*key, place.tensor, first))
        drawn = _draw(min(block, place.entries - first), device, generator)
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
