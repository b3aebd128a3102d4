"""Adam's moments in 8 bits an entry and a scale a block, the second one rounded stochastically.

With ``beta2`` 0.999 the second moment moves by some 0.1% in a step. 8-bit values lie 6-12% apart: rounded to the
nearest, an entry that should grow beside the largest of its block stays where it is. Here it is rounded up or down with
probabilities that make the expectation the value itself. Its format has no sign, 5 bits of exponent, 3 of mantissa, and
a scale for every block of at most 256 entries, and reaches over 32 binary orders of magnitude; fp8's 4 bits of exponent
reach over 18. What it costs: docs/results/state_formats.md.

The first moment, which moves by 10% in a step, is ``float8_e4m3fn``, rounded to the nearest.

A step is the first moment over the root of the second, and Cauchy-Schwarz bounds it where both are exact: by 7.3
times ``lr`` at the usual decay rates, by 3.2 for a lone gradient. A second moment of 0 beside a first one that is not
would take the bound away. So what is positive is never stored as 0, but as ``2^-32`` of its block's largest at least.
Its root is ``1.5e-5``, about the most that a first moment can be and fail to decay, being rounded to the nearest again
and again: 4 steps of its smallest, ``1.7e-5`` of its block's largest. And blocks do not run across rows, where the
width allows: in an embedding the tokens of neighbouring rows have nothing in common, one seen in every batch, the other
never.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from elsa_modifier.admm.placement import is_fused
from elsa_modifier.admm.rounding import uniform_int16
from elsa_modifier.admm.storage import BLOCK, as_float, chunks, in_blocks, padded

__all__ = ["FirstMoment", "MomentPart", "SecondMoment", "moment_block", "read_first", "read_second", "write_first_"]
__all__ += ["write_second_"]

_SMALLEST_BLOCK = 32
# A second moment's smallest value, 2^-32 of it, is still a normal float.
_SMALLEST_SCALE = 2.0**-94

# Of a float's bits, what an 8-bit second moment drops, and the code of 1.0, a block's largest, before it is made 255.
_DROPPED = 20
_CODE_OF_ONE = 127 << 3


def moment_block(shape: Sequence[int]) -> int:
    """Entries of a block: the largest power of two up to 256 that divides the width of a row.

    256, across rows, for vectors and where that power would be less than 32, whose scales would take too much.
    """
    width = shape[-1] if len(shape) > 1 else BLOCK
    block = math.gcd(width, BLOCK)
    return block if block >= _SMALLEST_BLOCK else BLOCK


class MomentPart(NamedTuple):
    """One of a moment's :func:`~elsa_modifier.admm.storage.chunks`: views.

    :param codes: as :func:`~elsa_modifier.admm.storage.in_blocks` gives them
    :param scale: of each block: (rows, blocks in a row, 1)
    """

    codes: Tensor
    scale: Tensor


class _Moment:
    """A flat tensor in one byte an entry, and a scale for each block, of a parameter."""

    dtype: torch.dtype

    def __init__(self, parameter: Tensor) -> None:
        self.codes = torch.zeros(parameter.numel(), dtype=self.dtype, device=parameter.device)
        self.block = moment_block(parameter.shape)
        """Entries that share a scale."""
        self.scale = torch.zeros(padded(parameter.numel(), self.block) // self.block, device=parameter.device)
        self._shape = parameter.shape

    def held(self) -> list[Tensor]:
        """For :class:`~elsa_modifier.admm.offloading.Holder`, as :meth:`hold`."""
        return [self.codes, self.scale]

    def hold(self, tensors: Sequence[Tensor]) -> None:
        self.codes, self.scale = tensors

    def part(self, start: int, end: int) -> MomentPart:
        """Entries ``start``, a multiple of 256, to ``end``."""
        codes = in_blocks(self.codes[start:end], self.block)
        scale = self.scale[start // self.block : padded(end, self.block) // self.block]
        return MomentPart(codes, scale.view(len(codes), -1, 1))

    def parts(self) -> list[tuple[int, int, MomentPart]]:
        """All of it."""
        spans = chunks(self.codes.numel(), self.codes.device)
        return [(start, end, self.part(start, end)) for start, end in spans]

    def dequantize(self) -> Tensor:
        """All of it: fp32, the shape of the parameter."""
        values = torch.empty(self.codes.numel(), device=self.codes.device)
        for start, end, part in self.parts():
            values[start:end] = self._read(part).view(-1)
        return values.view(self._shape)

    def quantize_(self, values: Tensor) -> None:
        """Take fp32 values of the parameter's size, as :meth:`dequantize` gives them."""
        for start, end, part in self.parts():
            self._write_(part, in_blocks(values.reshape(-1)[start:end], self.block).clone())

    @staticmethod
    def _read(part: MomentPart) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def _write_(part: MomentPart, values: Tensor) -> None:
        raise NotImplementedError


def read_first(part: MomentPart) -> Tensor:
    """In ``float8_e4m3fn``, a block's largest as 448: fp32, a new tensor."""
    return as_float(part.codes).mul_(1 / 448).mul_(part.scale)


def write_first_(part: MomentPart, values: Tensor, ok: Tensor | None = None) -> None:
    """Rounded to the nearest.

    :param values: fp32, overwritten
    :param ok: zero-dimensional bool: where it is False all stays as it is
    """
    scale = _scales_of(values)
    _store_(part, values.div_(scale).mul_(448), scale, ok)


def read_second(part: MomentPart) -> Tensor:
    """In 5 bits of exponent and 3 of mantissa, a block's largest as 1; 0 if it is 0 alone. fp32, a new tensor."""
    codes = part.codes
    if is_fused(codes.device):
        values = torch.where(codes == 0, 0.0, _values_of(codes.to(torch.int32)))
    else:
        values = _table().index_select(0, codes.view(-1).to(torch.int32)).view(codes.shape)
    return values.mul_(part.scale)


def write_second_(part: MomentPart, values: Tensor, noise: Tensor | None = None, ok: Tensor | None = None) -> None:
    """Rounded stochastically; other arguments as in :func:`write_first_`.

    :param noise: int16, or int32 in its range, of the same shape, uniform over all of int16; None draws it
    """
    # Found out before the division, in which the smallest vanish; from the bits, as a CPU is slow to compare.
    positive = values.view(torch.int32).clamp(max=1).to(torch.uint8)
    scale = _scales_of(values)
    bits = values.div_(scale).view(torch.int32)
    # 16 random bits at the upper end of those dropped, and what is carried over rounds up.
    drawn = uniform_int16(bits) if noise is None else noise
    drawn = drawn.to(torch.int32).add_(1 << 15).bitwise_left_shift_(_DROPPED - 16)
    rounded = bits.add_(drawn).bitwise_right_shift_(_DROPPED).sub_(_CODE_OF_ONE - 255).clamp_(min=0)
    codes = rounded.to(torch.uint8)
    _store_(part, torch.maximum(codes, positive, out=codes), scale, ok)


class FirstMoment(_Moment):
    """See :func:`read_first`."""

    dtype = torch.float8_e4m3fn
    _read = staticmethod(read_first)
    _write_ = staticmethod(write_first_)


class SecondMoment(_Moment):
    """See :func:`read_second`."""

    dtype = torch.uint8
    _read = staticmethod(read_second)
    _write_ = staticmethod(write_second_)


def _scales_of(values: Tensor) -> Tensor:
    return values.abs().amax(dim=2, keepdim=True).clamp_min_(_SMALLEST_SCALE)


def _store_(part: MomentPart, values: Tensor, scale: Tensor, ok: Tensor | None) -> None:
    codes = part.codes
    if ok is not None:
        # What a format holds is the same when it has been rounded again.
        values = torch.where(ok, values, codes.to(values.dtype))
        scale = torch.where(ok, scale, part.scale)
    codes.copy_(values)
    part.scale.copy_(scale)


def _values_of(codes: Tensor) -> Tensor:
    return (codes + (_CODE_OF_ONE - 255)).bitwise_left_shift(_DROPPED).view(torch.float32)


@functools.cache
def _table() -> Tensor:
    """The values of a second moment's 256 codes."""
    values = _values_of(torch.arange(256, dtype=torch.int32))
    values[0] = 0
    return values
