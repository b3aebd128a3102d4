"""Gradient release: each parameter takes its step inside the backward pass, and its gradient is dropped at once.

No more than a few gradients are then alive at a time. What needs all of them before the first step cannot be had:
clipping by their global norm, and accumulation over micro-batches.

Where ranks hold parts of matrices, FSDP calls the hook of a part when its gradient has been added up over ranks. What
every rank holds whole is stepped at the end.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from elsa_modifier.admm.optimizer import ADMMOptimizer
from elsa_modifier.training.parallel import Alone

__all__ = ["GradientRelease", "releasing_gradients"]


class GradientRelease:
    """What happens to parameters in one backward pass after another; see :func:`releasing_gradients`."""

    def __init__(self, optimizer: ADMMOptimizer, parallel: Alone) -> None:
        self._optimizer = optimizer
        self._parallel = parallel
        self._parameters = parallel.parameters
        self._stepped: set[int] = set()
        self._square_norms: list[Tensor] = []

    @torch.no_grad()
    def step(self, hooked: Tensor) -> None:
        """The hook of a parameter whose gradient is complete."""
        assert isinstance(hooked, nn.Parameter)
        parameter = self._parallel.take_gradient(hooked)
        assert parameter.grad is not None
        self._optimizer.mask_gradient_(parameter)
        # Not squared as a tensor, which would take eight bytes an entry: most of all that a large embedding needs.
        self._square_norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square())
        self._optimizer.step_parameter(parameter)
        parameter.grad = None
        self._stepped.add(id(parameter))

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Step what the backward pass did not reach, and end the optimizer's step.

        :returns: the gradients' global norm, zero-dimensional fp32
        """
        parts = torch.stack(self._square_norms).sum()
        self._square_norms.clear()
        for parameter in self._parallel.finish_gradients():
            if parameter.grad is not None:
                self.step(parameter)
        for parameter in self._parameters:
            if id(parameter) not in self._stepped:
                self._optimizer.step_parameter(parameter)
                parameter.grad = None
        whole = torch.stack(self._square_norms).sum() if self._square_norms else torch.zeros_like(parts)
        norm = (self._parallel.sum_of_parts(parts) + whole).sqrt()
        self._stepped.clear()
        self._square_norms.clear()
        self._optimizer.end_step()
        return norm


@contextmanager
def releasing_gradients(optimizer: ADMMOptimizer, parallel: Alone) -> Iterator[GradientRelease]:
    """Within the context every backward pass steps the parameters that it reaches."""
    release = GradientRelease(optimizer, parallel)
    hooks = [parameter.register_post_accumulate_grad_hook(release.step) for parameter in parallel.hooked()]
    try:
        yield release
    finally:
        for hook in hooks:
            hook.remove()
