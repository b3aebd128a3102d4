"""Numbers of a step read from an accelerator a few steps later, so that the host never waits for it.

The host is ahead of an accelerator: it prepares the next steps' kernels while one step computes. To ask for a loss at
once would end that. In main memory there is nothing to wait for, and numbers are read at once.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elsa_modifier.admm.placement import is_fused

__all__ = ["LateReads", "to_device"]

# Steps that may wait. Then the host waits for the first of them, which has long been computed.
_STEPS = 2

Told = Callable[[list[float]], None]


class LateReads:
    """Reads in order.

    :param device: of the numbers
    """

    def __init__(self, device: torch.device) -> None:
        self._is_late = is_fused(device)
        self._waiting: deque[tuple[Tensor, Any, Told]] = deque()

    @property
    def is_late(self) -> bool:
        """Whether the host goes on before it knows."""
        return self._is_late

    def read(self, numbers: Tensor, then: Told) -> None:
        """Call ``then`` with these numbers, one-dimensional, and before it those of earlier reads that have come.

        What ``then`` raises is raised here, or in a later call.
        """
        self._waiting.append((*start_copy(numbers), then))
        while self._waiting and (not self._is_late or len(self._waiting) > _STEPS):
            self._next()

    def finish(self) -> None:
        """Wait for all."""
        while self._waiting:
            self._next()

    def _next(self) -> None:
        copy, copied, then = self._waiting.popleft()
        if copied is not None:
            copied.synchronize()
        then(copy.tolist())


def start_copy(numbers: Tensor) -> tuple[Tensor, Any]:
    """A copy in main memory, and the event after which it is there; None if it is."""
    if not is_fused(numbers.device):
        return numbers, None
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    copied = torch.Event(numbers.device)
    copied.record()
    return copy, copied


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in main memory on the device; the host does not wait until it is there."""
    return tensor.pin_memory().to(device, non_blocking=True) if is_fused(device) else tensor.to(device)
