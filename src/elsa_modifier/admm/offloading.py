"""What an accelerator does not need between two uses, the moments and the ADMM state of a weight, in main memory.

The weights of a model lie on the accelerator. All else that is kept of them from step to step, 8 bytes a weight for
Adam in fp32, is brought there a weight at a time, while the one before it is computed with, and taken back. Two
weights' worth of it has a place there. Copies from and to pinned memory run in streams of their own, and the host waits
for none.

Not yet run on a GPU. That no copy comes too early or too late is tested with streams that run in any order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from elsa_modifier.admm.placement import is_fused

__all__ = ["Holder", "KeptState", "Lanes", "MovedState"]

# Where tensors begin in a room: what kernels of any dtype may ask for.
_ALIGNMENT = 256

Pairs = Iterable[tuple[Tensor, Tensor]]


@runtime_checkable
class Holder(Protocol):
    """What holds tensors that belong to one weight, under names of its own."""

    def held(self) -> list[Tensor]:
        """Those that may lie elsewhere, in an order that does not change."""

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Hold these instead, of the same shapes and dtypes."""


class MovedState:
    """Brings what is held of a weight to its device for a while; see the module.

    Where weights lie in main memory there are copies too: the values are the same, and nothing is gained.

    :param holders: of what is kept of a weight; asked anew each time
    :param lanes: by which copies are made
    """

    def __init__(self, holders: Callable[[Tensor], Sequence[Holder]], lanes: "Lanes") -> None:
        self._holders = holders
        self._lanes = lanes
        self._rooms = [_Room(), _Room()]
        self._occupied: _Room | None = None
        # Which weight was asked for after each one, as it will be again.
        self._next: dict[int, Tensor] = {}
        self._last: Tensor | None = None
        # The event after which a weight's tensors have been taken back.
        self._written: dict[int, Any] = {}

    @contextmanager
    def here(self, weight: Tensor, *, changed: bool) -> Iterator[None]:
        """Within the context all that is held of a weight is on its device. Of one weight at a time.

        :param changed: whether it is to be taken back; what is new always is
        """
        if self._last is not None:
            self._next[id(self._last)] = weight
        self._last = weight
        homes = self._held(weight)
        self._occupied = room = self._fetched(weight)
        self._lanes.wait(room.filled)
        self._hold(weight, room.tensors)
        following = self._next.get(id(weight))
        if following is not None and following is not weight:
            self._fetched(following)
        try:
            yield
        finally:
            self._take_back(weight, room, homes, changed=changed)
            self._occupied, room.weight = None, None

    def synchronize(self) -> None:
        """Wait until all has been taken back, and nothing is fetched. What holds it may be read and written then."""
        for event in [*self._written.values(), *(room.filled for room in self._rooms)]:
            self._lanes.finish(event)
        self._written.clear()
        for room in self._rooms:
            room.weight = None

    def _held(self, weight: Tensor) -> list[Tensor]:
        return [tensor for holder in self._holders(weight) for tensor in holder.held()]

    def _hold(self, weight: Tensor, tensors: Sequence[Tensor]) -> None:
        given = iter(tensors)
        for holder in self._holders(weight):
            holder.hold([next(given) for _ in holder.held()])

    def _fetched(self, weight: Tensor) -> "_Room":
        """The room that a weight's copies are in, or begin to be."""
        for room in self._rooms:
            if room.weight is weight:
                return room
        room = next(room for room in self._rooms if room is not self._occupied)
        homes = self._held(weight)
        self._make_room(room, homes)
        room.filled = self._lanes.up(zip(room.tensors, homes, strict=True), room.free, self._written.get(id(weight)))
        room.weight = weight
        return room

    def _make_room(self, room: "_Room", homes: Sequence[Tensor]) -> None:
        starts, end = [], 0
        for tensor in homes:
            starts.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if room.buffer is None or end > room.buffer.numel():
            # In the first steps alone. Nobody may still use the old one when its memory is given away, nor that of the
            # new one, for what it was before, when it is first written.
            for event in (room.filled, room.free):
                self._lanes.finish(event)
            room.buffer = self._lanes.empty(end)
            room.free = self._lanes.event()
        room.tensors = [
            room.buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, homes, strict=True)
        ]

    def _take_back(self, weight: Tensor, room: "_Room", homes: Sequence[Tensor], *, changed: bool) -> None:
        home_of = {id(view): home for view, home in zip(room.tensors, homes, strict=True)}
        kept, new = [], []
        for tensor in self._held(weight):
            home = home_of.get(id(tensor))
            if home is None:
                # Made in the meantime, by the stream that computes.
                home = self._lanes.empty_home(tensor)
                new.append((home, tensor))
            kept.append(home)
        room.free = self._lanes.along(new)
        if changed:
            room.free = self._lanes.down(zip(homes, room.tensors, strict=True), room.free)
        if changed or new:
            self._written[id(weight)] = room.free
        self._hold(weight, kept)


class _Room:
    """A place on the device for what is held of one weight.

    ``tensors`` are views of ``buffer``; ``weight`` is whose they are, None once they have been used. ``filled`` and
    ``free`` are the events after which they may be read, and overwritten.
    """

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.tensors: list[Tensor] = []
        self.weight: Tensor | None = None
        self.filled: Any = None
        self.free: Any = None


class Lanes:
    """Streams of an accelerator, for copies in either direction beside the one that computes, and what waits for what.

    Copies are of pairs, of what is written and what is read. In main memory there are no streams: what is asked for has
    been done, and events are None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = (torch.Stream(device), torch.Stream(device)) if is_fused(device) else None

    def up(self, pairs: Pairs, *after: Any) -> Any:
        """Copy to the device after these events; the event after which it is done."""
        return self._copy(0, pairs, after)

    def down(self, pairs: Pairs, *after: Any) -> Any:
        """The same, to main memory."""
        return self._copy(1, pairs, after)

    def along(self, pairs: Pairs) -> Any:
        """Copy in the stream that computes; the event after which that and all before it is done."""
        _copy_all(pairs)
        return self.event()

    def event(self) -> Any:
        """After all that the stream that computes has been asked for."""
        return None if self._streams is None else torch.accelerator.current_stream(self._device).record_event()

    def wait(self, event: Any) -> None:
        """Have the stream that computes wait."""
        if event is not None:
            torch.accelerator.current_stream(self._device).wait_event(event)

    def finish(self, event: Any) -> None:
        """Have the host wait."""
        if event is not None:
            event.synchronize()

    def empty(self, nbytes: int) -> Tensor:
        """Memory of the device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def empty_home(self, tensor: Tensor) -> Tensor:
        """Main memory for a tensor's values."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._streams is not None)

    def _copy(self, number: int, pairs: Pairs, after: Sequence[Any]) -> Any:
        if self._streams is None:
            return self.along(pairs)
        stream = self._streams[number]
        for event in after:
            if event is not None:
                stream.wait_event(event)
        with stream:
            _copy_all(pairs)
        return stream.record_event()


def _copy_all(pairs: Pairs) -> None:
    for to, source in pairs:
        to.copy_(source, non_blocking=True)


class _TensorsOf:
    """A :class:`Holder` of the tensors in a torch optimizer's state of a weight: moments, but no counts."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def held(self) -> list[Tensor]:
        return [self._state[key] for key in self._keys()]

    def hold(self, tensors: Sequence[Tensor]) -> None:
        self._state.update(zip(self._keys(), tensors, strict=True))

    def _keys(self) -> list[str]:
        return [key for key, value in self._state.items() if isinstance(value, Tensor) and value.ndim]


class KeptState:
    """What is kept of weights from step to step, an optimizer's moments and ADMM's pairs: on their device or moved off.

    :param base: the optimizer; StochasticAdam or one of torch's own
    :param offload: whether :class:`MovedState` keeps it in main memory
    """

    def __init__(self, base: Optimizer, device: torch.device, *, offload: bool) -> None:
        self._base = base
        self._pairs: dict[int, Holder] = {}
        self._moved = MovedState(self._holders, Lanes(device)) if offload else None

    @property
    def moves(self) -> bool:
        """Whether weights have to be stepped one after another."""
        return self._moved is not None

    def add(self, weight: Tensor, pair: Holder | None) -> None:
        """Keep a weight's pair too, if there is one."""
        if pair is not None:
            self._pairs[id(weight)] = pair

    def here(self, weight: Tensor, *, changed: bool) -> AbstractContextManager[None]:
        """See :meth:`MovedState.here`."""
        return nullcontext() if self._moved is None else self._moved.here(weight, changed=changed)

    def synchronize(self) -> None:
        """Wait until all may be read and written from elsewhere, wherever it is kept."""
        if self._moved is not None:
            self._moved.synchronize()

    def _holders(self, weight: Tensor) -> list[Holder]:
        pair = self._pairs.get(id(weight))
        moments: dict[str, Any] = self._base.state.get(weight) or {}
        own = [value for value in moments.values() if isinstance(value, Holder)]
        return [*([] if pair is None else [pair]), _TensorsOf(moments), *own]
