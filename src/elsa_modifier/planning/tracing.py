"""How much memory real model code holds, moment by moment, found out on tensors without data."""

import weakref
from collections.abc import Iterable
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveStorage", "Phase"]

_aten = torch.ops.aten
# Also written as an equality with the number of entries.
_CONDITIONS_ON_ALL = (_aten.all.default, _aten.all.dim, _aten.all.dims)


class Phase(Enum):
    """Where in a micro-batch a moment lies: in the forward pass, or in which layers' backward."""

    FORWARD = auto()
    TOP = auto()
    MIDDLE = auto()
    BOTTOM = auto()


class LiveStorage(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes until it dies, whoever holds it, autograd included.

    Gradients are counted by entries, apart from the rest, since a run may hold them in another dtype, or a share.
    Temporaries inside a kernel are not seen.

    What depends on values that are not there is answered for it. A number is zero. A condition is false, but for those
    on all of a tensor, by which models make sure that nothing is padded or packed. Of the entries that may be non-zero
    one in ``experts`` is, as when tokens are spread evenly over experts.

    :param held: tensors that are there before, not counted
    :param experts: of how many one is chosen
    """

    def __init__(self, held: Iterable[Tensor], *, experts: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = Phase.FORWARD
        self._experts = experts
        self._bytes = 0
        self._gradient_entries = 0
        self._moments: dict[Phase, list[tuple[int, int]]] = {phase: [] for phase in Phase}
        self._true: set[int] = set()
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        for tensor in held:
            self._see(tensor.untyped_storage(), 0)

    def peak(self, phase: Phase, bytes_per_gradient: float) -> float:
        """The most bytes at any moment of a phase, at so many bytes for an entry of a gradient."""
        return max((b + g * bytes_per_gradient for b, g in self._moments[phase]), default=0.0)

    def is_gradient(self, parameter: Tensor) -> None:
        """From now on the parameter's ``grad`` counts as a gradient; once, however often it is said."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        ref, counted = self._alive[storage._cdata]
        if counted:
            self._alive[storage._cdata] = (ref, 0)
            self._bytes -= counted
            self._gradient_entries += parameter.numel()
            self._note()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default:
            return _answer(args[0].dtype, args[0].untyped_storage()._cdata in self._true)
        if func is _aten.nonzero.default:
            rows = -(-args[0].numel() // self._experts)
            out = args[0].new_zeros((rows, args[0].ndim), dtype=torch.int64)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._see(storage, storage.nbytes())
                if func in _CONDITIONS_ON_ALL or (func is _aten.eq.Scalar and tensor.ndim == 0):
                    self._true.add(storage._cdata)
        return out

    def _see(self, storage: torch.UntypedStorage, count: int) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = (weakref.ref(storage, partial(self._gone, key)), count)
        self._bytes += count
        self._note()

    def _gone(self, key: int, _: Any) -> None:
        self._bytes -= self._alive.pop(key)[1]
        self._true.discard(key)

    def _note(self) -> None:
        self._moments[self.phase].append((self._bytes, self._gradient_entries))


def _answer(dtype: torch.dtype, condition: bool) -> bool | int | float:
    if dtype is torch.bool:
        return condition
    return 0.0 if dtype.is_floating_point else 0
