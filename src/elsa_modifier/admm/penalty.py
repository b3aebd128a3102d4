"""How the penalty grows over a run (arXiv 2510.01650, section 5 and appendix)."""

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["PenaltyForm", "PenaltySchedule", "ScheduleName"]

ScheduleName = Literal["constant", "linear", "cosine", "exponential"]
PenaltyForm = Literal["coupled", "decoupled"]

# The exponential schedule cannot start at zero; three decades is the range in which penalties are usually searched.
_EXPONENTIAL_RANGE = 1e3


@dataclass(frozen=True)
class PenaltySchedule:
    """Penalty as a function of the optimizer step.

    :param value: the final penalty: ``lam`` (coupled) or ``rho`` (decoupled)
    :param schedule: ``constant``; ``linear`` or ``cosine`` from 0; ``exponential`` from ``value / 1000``
    :param steps: the step at which ``value`` is reached; it stays there afterwards
    """

    value: float
    schedule: ScheduleName
    steps: int

    def __call__(self, step: int) -> float:
        progress = min(step / self.steps, 1.0) if self.steps > 0 else 1.0
        match self.schedule:
            case "constant":
                return self.value
            case "linear":
                return self.value * progress
            case "cosine":
                return self.value * (1 - math.cos(math.pi * progress)) / 2
            case "exponential":
                return self.value * math.pow(_EXPONENTIAL_RANGE, progress - 1)
        raise ValueError(f"penalty schedule is {self.schedule!r}; allowed are constant, linear, cosine, exponential")
