"""Adam as it is written on paper, and the values that an 8-bit second moment can have: slow, obvious."""

import math

from torch import Tensor


def second_moment_values() -> list[float]:
    """0, and every ``(1 + k/8) 2^e`` down from 1, 255 of them: in ascending order."""
    values, exponent = [1.0], -1
    while len(values) < 255:
        values += [(1 + k / 8) * 2.0**exponent for k in range(7, -1, -1)]
        exponent -= 1
    return [0.0, *sorted(values[:255])]


def adam(weight: Tensor, gradients: list[Tensor], lr: float, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The weight after a step with each gradient, and its second moment, in double precision."""
    x, m, v = weight.double(), 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        x = x - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8)
    assert not isinstance(v, float) and math.isfinite(float(v.sum()))
    return x, v
