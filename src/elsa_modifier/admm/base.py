"""What ADMM asks of the optimizer that it is around."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_modifier.admm.state import Pull

__all__ = ["BaseSteps", "RoundsOnce"]

BeforeRounding = Callable[[Tensor, int, int, int], Pull | None]


@runtime_checkable
class RoundsOnce(Protocol):
    """A base optimizer that takes ADMM's part of a step along, before new values are rounded to the weights' dtype.

    ``before_rounding`` is asked in each step of a parameter that has a gradient, once for each of its
    :func:`~elsa_modifier.admm.storage.chunks`, with the parameter, the chunk's start and end, and how many entries a
    block of the base optimizer has. What it gives is for :func:`~elsa_modifier.admm.state.pull_`.
    """

    before_rounding: BeforeRounding | None


class BaseSteps:
    """Steps of any torch optimizer, of all of its parameters or of one, which a value on its device may call off."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._rounding = optimizer if isinstance(optimizer, RoundsOnce) else None
        # Of every parameter, for the time of a step taken one parameter after another.
        self._group_of: dict[int, dict[str, Any]] = {}

    @property
    def rounds_once(self) -> bool:
        """Whether it takes ADMM's part of a step along."""
        return self._rounding is not None

    @property
    def can_skip(self) -> bool:
        """Whether it can leave all as it is because of a value that is on its device."""
        return self.rounds_once or all(group.get("fused") for group in self._optimizer.param_groups)

    @contextmanager
    def unless_not(self, ok: Tensor | None) -> Iterator[None]:
        """Within the context a step changes something only if ``ok``."""
        if ok is None:
            yield
            return
        # By the name under which torch's GradScaler tells its optimizers.
        optimizer = cast("Any", self._optimizer)
        optimizer.found_inf = (~ok).float()
        try:
            yield
        finally:
            optimizer.found_inf = None

    def step(self, before_rounding: BeforeRounding) -> None:
        """One step of all parameters that have a gradient.

        :param before_rounding: for an optimizer that :class:`RoundsOnce`
        """
        if self._rounding is None:
            self._optimizer.step()
            return
        # Not set for longer: a cycle of references would keep all states in memory until the next garbage collection.
        self._rounding.before_rounding = before_rounding
        try:
            self._optimizer.step()
        finally:
            self._rounding.before_rounding = None

    def step_of(self, parameter: Tensor, before_rounding: BeforeRounding) -> None:
        """One step of this parameter alone."""
        optimizer = self._optimizer
        if not self._group_of:
            self._group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        group = self._group_of[id(parameter)]
        all_groups, all_parameters = optimizer.param_groups, group["params"]
        optimizer.param_groups, group["params"] = [group], [parameter]
        try:
            self.step(before_rounding)
        finally:
            optimizer.param_groups, group["params"] = all_groups, all_parameters

    def parameters(self) -> list[nn.Parameter]:
        """All of them, in order."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def end_step(self) -> None:
        """All parameters have had theirs: groups may change until the next step."""
        self._group_of.clear()
