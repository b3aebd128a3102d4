"""What a Fisher projection weighs entries by: second moments that a base optimizer keeps anyway (arXiv 2510.01650)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from elsa_modifier.admm.moments import SecondMoment
from elsa_modifier.admm.placement import is_fused

__all__ = ["Projection", "SecondMoments"]

Projection = Literal["fisher", "magnitude"]


class SecondMoments:
    """Those of the weights to prune; none where the projection goes by magnitude.

    :param base: of the Adam family, if the projection is ``fisher``
    """

    def __init__(self, base: Optimizer, weights: Sequence[Tensor], projection: Projection) -> None:
        self._base = base
        self._weights = weights
        self._projection = projection

    def of(self, weight: Tensor) -> Tensor | SecondMoment | None:
        """As it is kept; None before the first gradient, when magnitudes are all that is known.

        :raises ValueError: if the optimizer keeps none
        """
        moments = None if self._projection == "magnitude" else self._base.state.get(weight)
        if not moments:
            return None
        if "exp_avg_sq" not in moments:
            raise ValueError(
                f"projection is 'fisher', but {type(self._base).__name__} keeps no second moment (exp_avg_sq); "
                "use an optimizer of the Adam family, or projection 'magnitude'"
            )
        found: Tensor | SecondMoment = moments["exp_avg_sq"]
        # torchao's, in few bits, is a tensor of its own kind.
        return found.dequantize() if isinstance(found, Tensor) and hasattr(found, "codes") else found

    def fisher(self, weight: Tensor) -> Tensor | None:
        """The same, fp32."""
        found = self.of(weight)
        return found.dequantize() if isinstance(found, SecondMoment) else None if found is None else found.float()

    def bias_corrections(self) -> list[float | Tensor | None]:
        """What each weight's scores are multiplied by, as their second moments are averages that started at zero.

        For scores of different weights that are compared. Only up to a common factor, which changes no ranking: all are
        None when all weights have taken as many steps.
        """
        if self._projection == "magnitude":
            return [None] * len(self._weights)
        betas = {id(p): group["betas"][1] for group in self._base.param_groups for p in group["params"]}
        decays = [betas[id(weight)] for weight in self._weights]
        steps = [self._base.state.get(weight, {}).get("step") for weight in self._weights]
        device = self._weights[0].device
        if any(isinstance(step, Tensor) and is_fused(step.device) for step in steps):
            # torch counts there, and the host does not ask.
            taken = [torch.ones((), device=device) if step is None else step for step in steps]
            decayed = torch.tensor(decays, dtype=torch.float64).to(device)
            factors = (1.0 - decayed ** torch.stack(taken).double()).rsqrt()
            return list((factors / factors.max()).float().unbind())
        known = [
            None if step is None else 1.0 / math.sqrt(1.0 - decay ** float(step))
            for decay, step in zip(decays, steps, strict=True)
        ]
        largest = max((k for k in known if k is not None), default=1.0)
        return [None if k is None or k == largest else k / largest for k in known]
