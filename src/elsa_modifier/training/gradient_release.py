"""Gradient release: each parameter takes its step inside the backward pass, and its gradient is dropped at once.

No more than a few gradients are then alive at a time. What needs all of them before the first step cannot be had:
clipping by their global norm, and accumulation over micro-batches.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from elsa_modifier.admm.optimizer import ADMMOptimizer

__all__ = ["GradientRelease", "releasing_gradients"]


class GradientRelease:
    """What happens to parameters in one backward pass after another; see :func:`releasing_gradients`."""

    def __init__(self, optimizer: ADMMOptimizer, parameters: list[nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._stepped: set[int] = set()
        self._square_norms: list[Tensor] = []

    @torch.no_grad()
    def step(self, parameter: Tensor) -> None:
        """The hook of a parameter whose gradient is complete."""
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
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
        for parameter in self._parameters:
            if id(parameter) not in self._stepped:
                self._optimizer.step_parameter(parameter)
                parameter.grad = None
        norm = torch.stack(self._square_norms).sum().sqrt()
        self._stepped.clear()
        self._square_norms.clear()
        self._optimizer.end_step()
        return norm


@contextmanager
def releasing_gradients(optimizer: ADMMOptimizer, parameters: list[nn.Parameter]) -> Iterator[GradientRelease]:
    """Within the context every backward pass steps the parameters that it reaches."""
    release = GradientRelease(optimizer, parameters)
    hooks = [parameter.register_post_accumulate_grad_hook(release.step) for parameter in parameters]
    try:
        yield release
    finally:
        for hook in hooks:
            hook.remove()
