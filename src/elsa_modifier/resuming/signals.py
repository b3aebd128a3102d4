"""A request to stop, by SIGTERM or SIGINT, which is granted between two steps; a second one at once.

A terminal or a scheduler tells a launcher and its ranks alike, and the launcher passes on what it was told: a rank is
told twice by one who asked once. So to a rank a second signal is one only after some seconds.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from elsa_modifier.training.loop import TrainingStopped
from elsa_modifier.training.ranks import launched_ranks

__all__ = ["StopRequest", "catching_stop_requests", "stop"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO_SECONDS = 5.0
_SAID = b"\nELSA: stopping after this step, with a training checkpoint. Once more to stop at once.\n"


class StopRequest:
    """Which signal has come; 0 if none has."""

    signal: int = 0


@contextmanager
def catching_stop_requests() -> Iterator[StopRequest]:
    """Within the context a first signal is noted only. Outside the main thread, which gets them all, nothing is."""
    request = StopRequest()
    echo = _ECHO_SECONDS if launched_ranks() > 1 else 0.0
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if request.signal and time.monotonic() - first < echo:
            return
        if request.signal:
            stop(number, at_once=True)
        request.signal, first = number, time.monotonic()
        # Not by a logger, whose lock the code that was interrupted may hold.
        os.write(2, _SAID)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(number: int, *, at_once: bool = False) -> None:
    """End as a process ends that does not catch the signal, but through its ``finally`` clauses.

    :raises KeyboardInterrupt: for SIGINT
    :raises SystemExit: for another one, with the status that a shell has for it
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt if at_once else TrainingStopped
    raise SystemExit(128 + number)
