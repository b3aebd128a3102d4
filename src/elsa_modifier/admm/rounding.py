"""Stochastic rounding to bf16: up or down with probabilities that make the expectation the value itself.

An update smaller than half of a bf16 weight's last place would be lost to rounding to the nearest, in every step anew.
"""

import torch
from torch import Tensor

__all__ = ["round_stochastically_", "uniform_int16"]

_INT64 = torch.iinfo(torch.int64)


@torch.no_grad()
def round_stochastically_(target: Tensor, values: Tensor) -> None:
    """Write fp32 ``values``, which are overwritten, to ``target``, bf16 of the same shape. Values must be finite."""
    bits = values.view(torch.int32)
    # Uniform below one unit in bf16's last place: int16 is as uniform, half a unit lower.
    bits.add_(uniform_int16(values)).add_(1 << 15)
    bits.bitwise_and_(-(1 << 16))
    target.copy_(values)


def uniform_int16(like: Tensor) -> Tensor:
    """Random numbers over all of int16, in the shape and on the device of another tensor."""
    count = like.numel()
    # Four from each 64-bit one: drawing them is what takes most of the time.
    noise = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device).random_(_INT64.min, None)
    return noise.view(torch.int16)[:count].view(like.shape)
