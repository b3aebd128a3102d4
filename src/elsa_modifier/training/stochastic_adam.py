"""Adam with moments in 8 bits whose second one does not stand still.

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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_modifier.admm.rounding import Place, keyed_int16, round_stochastically_, uniform_int16
from elsa_modifier.admm.storage import BLOCK, as_float, block_maxima, chunks, padded, scale_blocks_

__all__ = ["FirstMoment", "SecondMoment", "StochasticAdam", "moment_block"]

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


class _Moment(ABC):
    """A flat tensor in one byte an entry, and a scale for each block.

    :param codes: zeros, (entries,) in the dtype of the codes
    :param shape: of the parameter
    """

    def __init__(self, codes: Tensor, shape: torch.Size) -> None:
        self.codes = codes
        self._block = moment_block(shape)
        self.scale = torch.zeros(padded(codes.numel(), self._block) // self._block, device=codes.device)
        self._shape = shape

    @property
    def block(self) -> int:
        """Entries that share a scale."""
        return self._block

    def dequantize(self) -> Tensor:
        """All of it: fp32, the shape of the parameter."""
        return self.read(0, self.codes.numel()).view(self._shape)

    def read(self, start: int, end: int) -> Tensor:
        """Entries ``start``, a multiple of 256, to ``end``: fp32, a new tensor."""
        values = self._decode(self.codes[start:end])
        scale_blocks_(values, self._scales_of(start, end), torch.Tensor.mul_, self._block)
        return values

    def write(self, start: int, end: int, values: Tensor, noise: Tensor | None = None) -> None:
        """Store fp32 ``values``, which are overwritten; ``noise`` is for the moment that is rounded stochastically."""
        scales = self._scales_of(start, end)
        scales.copy_(block_maxima(values, self._block)[:, None]).clamp_min_(_SMALLEST_SCALE)
        scale_blocks_(values, scales, torch.Tensor.div_, self._block)
        self._encode(values, self.codes[start:end], noise)

    def _scales_of(self, start: int, end: int) -> Tensor:
        return self.scale[start // self._block : padded(end, self._block) // self._block, None]

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """The values of codes, from -1 to 1: fp32, a new tensor."""

    @abstractmethod
    def _encode(self, values: Tensor, codes: Tensor, noise: Tensor | None) -> None:
        """Write the codes of values from -1 to 1, which may be overwritten."""


class FirstMoment(_Moment):
    """In ``float8_e4m3fn``, a block's largest as 448, rounded to the nearest."""

    def __init__(self, parameter: Tensor) -> None:
        codes = torch.zeros(parameter.numel(), dtype=torch.float8_e4m3fn, device=parameter.device)
        super().__init__(codes, parameter.shape)

    def _decode(self, codes: Tensor) -> Tensor:
        return as_float(codes, torch.empty(codes.shape, device=codes.device)).mul_(1 / 448)

    def _encode(self, values: Tensor, codes: Tensor, noise: Tensor | None) -> None:
        codes.copy_(values.mul_(448))


class SecondMoment(_Moment):
    """In 5 bits of exponent and 3 of mantissa, a block's largest as 1, rounded stochastically; 0 if it is 0 alone."""

    def __init__(self, parameter: Tensor) -> None:
        codes = torch.zeros(parameter.numel(), dtype=torch.uint8, device=parameter.device)
        super().__init__(codes, parameter.shape)

    def write(self, start: int, end: int, values: Tensor, noise: Tensor | None = None) -> None:
        # Found out before the division, in which the smallest vanish; from the bits, as a CPU is slow to compare.
        positive = values.view(torch.int32).clamp(max=1).to(torch.uint8)
        super().write(start, end, values, noise)
        codes = self.codes[start:end]
        torch.maximum(codes, positive, out=codes)

    def _decode(self, codes: Tensor) -> Tensor:
        return _table(codes.device).index_select(0, codes.to(torch.int32))

    def _encode(self, values: Tensor, codes: Tensor, noise: Tensor | None) -> None:
        bits = values.view(torch.int32)
        # 16 random bits at the upper end of those dropped, and what is carried over rounds up.
        drawn = uniform_int16(bits) if noise is None else noise
        rounded = bits.add_(
            drawn.to(torch.int32).add_(1 << 15).bitwise_left_shift_(_DROPPED - 16)
        ).bitwise_right_shift_(_DROPPED)
        codes.copy_(rounded.sub_(_CODE_OF_ONE - 255).clamp_(min=0))


@functools.cache
def _table(device: torch.device) -> Tensor:
    """The values of a second moment's 256 codes."""
    values = (torch.arange(256, dtype=torch.int32) + (_CODE_OF_ONE - 255)).bitwise_left_shift(_DROPPED)
    values[0] = 0
    return values.view(torch.float32).to(device)


class StochasticAdam(Optimizer):
    """Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) in fp32 arithmetic, on moments in 8 bits.

    bf16 parameters are rounded stochastically too, after whatever else changes them in a step: see
    :class:`~elsa_modifier.admm.optimizer.RoundsOnce`.

    :param parameters: fp32 or bf16, contiguous
    :param seed: of the noise, which is then a function of it, the parameter's step and the entry alone; None draws from
        torch's generator
    :param places: of each parameter among all; None numbers them in order
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int | None = None,
        places: Sequence[Place] | None = None,
    ) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})
        self._seed = seed
        places = places or [Place(i, 0, p.numel()) for i, p in enumerate(parameters)]
        self._places = {id(p): place for p, place in zip(parameters, places, strict=True)}
        self.before_rounding: Callable[[Tensor, int, int, Tensor], None] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient.

        :raises ValueError: if there is a closure, which would have to be evaluated first
        """
        if closure is not None:
            raise ValueError("a closure is not supported: compute the gradients before the step")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, **{key: group[key] for key in ("lr", "betas", "eps")})

    def _step(self, parameter: nn.Parameter, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = FirstMoment(parameter), SecondMoment(parameter)
        state["step"] += 1
        corrections = [1 - beta ** state["step"] for beta in betas]
        weights, gradients = parameter.detach().view(-1), parameter.grad.detach().reshape(-1)  # type: ignore[union-attr]
        for start, end in chunks(parameter.numel(), parameter.device):
            gradient, weight = gradients[start:end].float(), weights[start:end]
            first = state["exp_avg"].read(start, end).lerp_(gradient, 1 - betas[0])
            second = state["exp_avg_sq"].read(start, end)
            second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
            denominator = second.sqrt().mul_(1 / math.sqrt(corrections[1])).add_(eps)
            values = weight if weight.dtype == torch.float32 else weight.float()
            values.addcdiv_(first, denominator, value=-lr / corrections[0])
            if self.before_rounding is not None:
                self.before_rounding(parameter, start, end, values)
            if values is not weight:
                round_stochastically_(weight, values, self._noise(parameter, state["step"], 0, start, end))
            state["exp_avg"].write(start, end, first)
            state["exp_avg_sq"].write(start, end, second, self._noise(parameter, state["step"], 1, start, end))

    def _noise(self, parameter: Tensor, step: int, purpose: int, start: int, end: int) -> Tensor | None:
        if self._seed is None:
            return None
        return keyed_int16((self._seed, step, purpose), self._places[id(parameter)], start, end, parameter.device)
