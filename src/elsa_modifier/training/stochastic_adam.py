"""Adam in fp32 arithmetic on moments in 8 bits (see :mod:`elsa_modifier.admm.moments`): a step of each weight at once.

On an accelerator a step is one kernel, which reads and writes each byte once. In main memory it goes through a weight
in chunks.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_modifier.admm.moments import (
    FirstMoment,
    MomentPart,
    SecondMoment,
    moment_block,
    read_first,
    read_second,
    write_first_,
    write_second_,
)
from elsa_modifier.admm.placement import compiled, is_fused
from elsa_modifier.admm.rounding import (
    Key,
    Place,
    drawn_key,
    hashed_int16,
    key_of,
    keyed_int16,
    rounded_stochastically,
    uniform_int16,
)
from elsa_modifier.admm.state import Pull, pull_
from elsa_modifier.admm.storage import chunks, in_blocks

__all__ = ["FirstMoment", "SecondMoment", "StochasticAdam", "moment_block"]

# What a step's numbers are drawn for.
_WEIGHT, _MOMENT = 0, 1


class StochasticAdam(Optimizer):
    """Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) in fp32 arithmetic, on moments in 8 bits.

    bf16 parameters are rounded stochastically too, after whatever else changes them in a step: see
    :class:`~elsa_modifier.admm.base.RoundsOnce`.

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
        self.before_rounding: Callable[[Tensor, int, int, int], Pull | None] | None = None
        self.found_inf: Tensor | None = None
        """As torch's GradScaler sets it: zero-dimensional fp32, not 0 where a step is to change nothing."""

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
        first, second = state["exp_avg"], state["exp_avg_sq"]
        corrections = [1 - beta ** state["step"] for beta in betas]
        rate, inverse_root = lr / corrections[0], 1 / math.sqrt(corrections[1])
        ok = None if self.found_inf is None else self.found_inf == 0
        weights, gradients = parameter.detach().view(-1), parameter.grad.detach().reshape(-1)  # type: ignore[union-attr]
        for start, end in chunks(parameter.numel(), parameter.device):
            weight, gradient = (in_blocks(t[start:end], first.block) for t in (weights, gradients))
            moments = first.part(start, end), second.part(start, end)
            pull = None if self.before_rounding is None else self.before_rounding(parameter, start, end, first.block)
            noise = self._noise(parameter, state["step"], start, end)
            adam_(weight, gradient, *moments, rate, inverse_root, pull, noise, ok, betas=betas, eps=eps)

    def _noise(self, parameter: Tensor, step: int, start: int, end: int) -> Key | tuple[Tensor, Tensor] | None:
        """For a part's weights and second moments; None draws it in the step."""
        place = self._places[id(parameter)]
        if is_fused(parameter.device):
            return drawn_key() if self._seed is None else key_of((self._seed, step), place, start)
        if self._seed is None:
            return None
        purposes = [_WEIGHT, _MOMENT] if parameter.dtype == torch.bfloat16 else [_MOMENT, _MOMENT]
        drawn = [
            keyed_int16((self._seed, step, purpose), place, start, end, parameter.device)
            for purpose in dict.fromkeys(purposes)
        ]
        return drawn[0], drawn[-1]


@compiled
def adam_(
    weight: Tensor,
    gradient: Tensor,
    first: MomentPart,
    second: MomentPart,
    rate: float,
    inverse_root: float,
    pull: Pull | None,
    noise: Key | tuple[Tensor, Tensor] | None,
    ok: Tensor | None,
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of Adam (arXiv 1412.6980, algorithm 1) and of ADMM on a part of a weight, in place.

    :param weight: fp32 or bf16, and ``gradient``: (rows, blocks in a row, entries of a block)
    :param rate: the learning rate over the first moment's bias correction
    :param inverse_root: 1 over the root of the second moment's
    :param pull: what comes between the optimizer's step and rounding
    :param ok: zero-dimensional bool: where it is False all stays as it is
    """
    gradient = gradient.float()
    m = read_first(first).lerp_(gradient, 1 - betas[0])
    v = read_second(second).mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    denominator = v.sqrt().mul_(inverse_root).add_(eps)
    in_place = weight.dtype == torch.float32 and ok is None
    values = weight if in_place else weight.to(torch.float32, copy=True)
    values.addcdiv_(m * rate, denominator, value=-1)
    if pull is not None:
        pull_(values, pull)
    of_weight, of_moment = _drawn(noise, weight)
    if weight.dtype != torch.float32:
        values = rounded_stochastically(values, uniform_int16(values) if of_weight is None else of_weight)
    if not in_place:
        weight.copy_(values if ok is None else torch.where(ok, values, weight.float()))
    write_first_(first, m, ok)
    write_second_(second, v, of_moment, ok)


def _drawn(noise: Key | tuple[Tensor, Tensor] | None, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if noise is None:
        return None, None
    if isinstance(noise, Key):
        return hashed_int16(noise, weight.shape, weight.device)
    return noise[0].view(weight.shape), noise[1].view(weight.shape)
