"""Several processes as one run: who they are, what they send each other, and how one that fails ends all."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from compressed_tensors.offload import as_single_threaded
from compressed_tensors.utils import patch_attr
from llmcompressor.transformers.compression import compressed_tensors_utils
from loguru import logger
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

__all__ = ["RankFailed", "Ranks", "by_itself", "is_first_process", "launched_ranks", "ranks_of_this_run"]

# What torchrun and accelerate tell a process, and what torch.distributed reads.
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAILURE = "failure"
# A rank that is late, as one that reads a slow disk, is waited for.
_TIMEOUT = timedelta(hours=2)

_met: tuple[Store, int, int] | None = None
_runs = 0


class RankFailed(RuntimeError):
    """Another rank failed first, for the reason that is given, or is gone."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    :param rank: from 0
    :param count: 2 or more
    :param device: of this process
    :param group: of all, for tensors in main memory
    """

    rank: int
    count: int
    device: torch.device
    group: Any

    @property
    def is_first(self) -> bool:
        """Whether this one writes, logs and shows the bar."""
        return self.rank == 0

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of a tensor, a new one where it is; on an accelerator the host does not wait for it."""
        total = tensor.clone()
        dist.all_reduce(total, group=self.group if total.device.type == "cpu" else None)
        return total

    def from_first(self, value: Any) -> Any:
        """The first rank's picklable value, on all."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


def launched_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes a launcher that torch.distributed knows has started as one run; 1 without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    if not all(environment.get(name) for name in _LAUNCHED):
        return 1
    return int(environment["WORLD_SIZE"])


def is_first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is rank 0, or alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return launched_ranks(environment) == 1 or environment["RANK"] == "0"


@contextmanager
def ranks_of_this_run() -> Iterator[Ranks | None]:
    """The ranks of a run that a launcher has started as several processes, within the context; None if it is one.

    The process group is started, and ended, here, unless there is one already. Ranks but the first log nothing. If one
    fails, the others raise :class:`RankFailed` with its message as soon as they miss it, and otherwise the launcher
    ends them.
    """
    if launched_ranks() == 1:
        yield None
        return
    global _runs
    _runs += 1
    started = not dist.is_initialized()
    device = _own_device()
    if started:
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{_backend_of(device)}"
        store, rank, count = _rendezvous()
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_TIMEOUT)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo", timeout=_TIMEOUT))
    try:
        with _telling_failures(ranks):
            if not ranks.is_first:
                logger.disable("elsa_modifier")
            yield ranks
    finally:
        if not ranks.is_first:
            logger.enable("elsa_modifier")
    # Not after a failure, when those who should agree to it may be gone.
    dist.barrier(group=ranks.group)
    if started:
        dist.destroy_process_group()
    else:
        dist.destroy_process_group(ranks.group)


def _rendezvous() -> tuple[Store, int, int]:
    """Where processes find each other, this one's rank, and how many there are."""
    global _met
    if _met is None:
        logger.info(
            f"Joining the other processes: this one is rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}."
        )
        _met = next(rendezvous("env://", timeout=_TIMEOUT))
    store, rank, count = _met
    # What a run before this one in the same processes has left there would be taken for answers.
    return PrefixStore(f"elsa_modifier/{_runs}", store), rank, count


@contextmanager
def by_itself() -> Iterator[None]:
    """Within the context llm-compressor takes this process for the only one, and does not wait for others to save."""
    if launched_ranks({}) == 1:
        yield
        return
    with (
        as_single_threaded(),
        patch_attr(compressed_tensors_utils, "suspend_distributed_timeout", nullcontext),
    ):
        yield


def _own_device() -> torch.device:
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", dist.get_rank() if dist.is_initialized() else os.environ["RANK"]))
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    count = torch.accelerator.device_count()
    if local >= count:
        raise ValueError(
            f"LOCAL_RANK is {local}, and this machine has {count} accelerators; allowed is one process for each: start "
            f"torchrun with --nproc-per-node {count} or less"
        )
    torch.accelerator.set_device_index(local)
    return torch.device(accelerator.type, local)


def _backend_of(device: torch.device) -> str:
    backend: str = dist.get_default_backend_for_device(device)
    return backend


@contextmanager
def _telling_failures(ranks: Ranks) -> Iterator[None]:
    """Leave word of what made this rank fail, or say what made another one."""
    store = dist.distributed_c10d._get_default_store()
    own = f"rank {ranks.rank}"
    # Not what a run before this one has left, if someone caught its failure.
    word = f"{_FAILURE}/{_runs}"
    try:
        yield
    except Exception as error:
        first = f"{own}: {type(error).__name__}: {error}"
        # The store may be gone with the process that had it.
        with suppress(Exception):
            first = store.compare_set(word, "", first).decode()
        if not first.startswith(own) and first.partition(": ")[2] != f"{type(error).__name__}: {error}":
            raise RankFailed(f"another rank failed, and with it the run: {first}") from error
        if _is_lost_connection(error):
            raise RankFailed(
                "another process of this run is gone without a word, as after kill -9 or when memory runs out; what "
                f"started the processes says which one ({error})"
            ) from error
        raise


def _is_lost_connection(error: Exception) -> bool:
    # gloo's errors are of no class of their own.
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or "gloo/transport" in str(error)
