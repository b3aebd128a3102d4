"""Agreement among the ranks of torch.distributed; in a single process what one thinks is what all do."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

__all__ = ["first_rank_decides", "is_first_rank", "largest_of", "new_cpu_group", "rank"]

T = TypeVar("T")
# A rank that writes to a slow disk is waited for.
_TIMEOUT = timedelta(hours=2)


def new_cpu_group() -> ProcessGroup | None:
    """A group of all ranks that talks through the CPU, for one thread's use; None for a single process."""
    return dist.new_group(backend="gloo", timeout=_TIMEOUT) if _several() else None


def rank() -> int:
    """This process's number, 0 if it is the only one."""
    return dist.get_rank() if _several() else 0


def is_first_rank() -> bool:
    """Whether this is the process that writes what is written once."""
    return rank() == 0


def first_rank_decides(decide: Callable[[], T], group: ProcessGroup | None) -> T:
    """What ``decide`` returns or raises on the first rank, on all ranks; the others do not call it."""
    if group is None:
        return decide()
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if is_first_rank():
        try:
            outcome[0] = (decide(), None)
        except Exception as error:
            outcome[0] = (None, error)
    dist.broadcast_object_list(outcome, src=0, group=group)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def largest_of(values: Sequence[int], group: ProcessGroup | None) -> list[int]:
    """The largest of what the ranks have, number by number."""
    if group is None:
        return list(values)
    largest = torch.tensor(values)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest.tolist()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
