"""How a run is spread over ranks: one process alone, or several that each hold the whole model.

The third way, in which each holds a part, is :mod:`elsa_modifier.training.fully_sharded`. In all of them a step has the
same global batch, and its gradient is the sum over all of it: what comes out depends on the number of ranks by the
order in which floating-point numbers are added up, and by nothing else but dropout.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from elsa_modifier.admm.rounding import Place
from elsa_modifier.admm.selection import WHOLE, Shards
from elsa_modifier.admm.state import ADMMState
from elsa_modifier.training.data import IGNORED_LABEL, BatchSource, PackedBatches
from elsa_modifier.training.distillation import copy_as_teacher
from elsa_modifier.training.objective import Objective
from elsa_modifier.training.ranks import Ranks

__all__ = [
    "Alone",
    "ParallelName",
    "Replicated",
    "add_gradients",
    "drawing_alike",
    "forked_generators",
    "gradient_norm",
    "name_number",
    "own_part",
]

ParallelName = Literal["fsdp", "ddp"]

# Gradients are added up over ranks this many entries at a time, in fp32.
_BUCKET = 1 << 24


class Alone:
    """One process, which trains the model as it is: what the others differ from.

    :param model: to be trained; its parameters are on the device
    """

    shards: Shards = WHOLE
    is_first = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def begin(self) -> None:
        """To be called once the model has run, and torch's generator has been seeded."""

    def local(self, parameter: nn.Parameter) -> nn.Parameter:
        """What this rank's optimizer steps of one of the model's parameters: an ordinary one, perhaps empty."""
        return parameter

    def places(self) -> list[Place]:
        """Where each of ``parameters`` lies among those of the whole model."""
        return [Place(name_number(n), 0, p.numel()) for n, p in self.model.named_parameters() if p.requires_grad]

    def teacher(self) -> PreTrainedModel:
        """A copy of the model as it is now, in evaluation mode, for an objective to compare with."""
        return copy_as_teacher(self.model)

    def objective(self, objective: Objective) -> Objective:
        """The same objective, for the model of this run."""
        return objective

    def batches(self, source: BatchSource) -> BatchSource:
        """A source that has the same global batches on every rank."""
        return source

    def part_of(self, micro_batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """This rank's part of the global batch."""
        return micro_batches

    def collect_gradients(self, loss: Tensor) -> Tensor:
        """Called after the backward passes of a step: makes this rank's gradients those of the global batch.

        :param loss: zero-dimensional fp32, of this rank's part
        :returns: of the global batch
        """
        return loss

    def total_norm(self) -> Tensor:
        """The global norm of the gradients, zero-dimensional fp32."""
        return gradient_norm(self.parameters, self.parameters[0].device)

    def hooked(self) -> list[nn.Parameter]:
        """With gradient release: the parameters whose gradients are complete in the backward pass, one by one."""
        return self.parameters

    def take_gradient(self, hooked: nn.Parameter) -> nn.Parameter:
        """What is stepped of one of them, with its gradient, which ``hooked`` no longer has."""
        return hooked

    def finish_gradients(self) -> list[nn.Parameter]:
        """After the backward pass: the parameters whose gradients are complete now, and not before."""
        return []

    def sum_of_parts(self, value: Tensor) -> Tensor:
        """Over ranks, of a zero-dimensional tensor: a loss, or what the gradients of parts have come to."""
        return value

    def drawing(self, step: int) -> AbstractContextManager[None]:
        """Around an optimizer's step, which may draw random numbers."""
        return nullcontext()

    def whole_bits(self, state: ADMMState, parameter: nn.Parameter) -> Tensor:
        """The packed mask of a whole parameter, of which ``state`` is that of ``local(parameter)``."""
        return state.bits


class Replicated(Alone):
    """Every rank holds the whole model, its optimizer's state and ADMM's, and takes the same steps.

    :param seed: of what differs between ranks (dropout), and of what must not (rounding)
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks, seed: int) -> None:
        super().__init__(model)
        self.ranks = ranks
        self.is_first = ranks.is_first
        self._seed = seed
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                dist.broadcast(tensor.detach(), src=0)

    def begin(self) -> None:
        # Only dropout draws from here on, and ranks have different rows.
        torch.manual_seed(self._seed + self.ranks.rank)

    def batches(self, source: BatchSource) -> BatchSource:
        return source if isinstance(source, PackedBatches) else _FromFirst(source, self.ranks)

    def part_of(self, micro_batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return [own_part(batch, self.ranks.rank, self.ranks.count) for batch in micro_batches]

    @torch.no_grad()
    def collect_gradients(self, loss: Tensor) -> Tensor:
        return add_gradients(self.parameters, loss)

    def drawing(self, step: int) -> AbstractContextManager[None]:
        return drawing_alike(self._seed, step, self.ranks.device)


class _FromFirst:
    """The first rank's batches, on all: nobody knows what a loader of the user's own gives on each."""

    def __init__(self, source: BatchSource, ranks: Ranks) -> None:
        self._source = source
        self._ranks = ranks

    def micro_batches(self, step: int) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = self._ranks.from_first(
            self._source.micro_batches(step) if self._ranks.is_first else None
        )
        return found


def own_part(batch: dict[str, Tensor], rank: int, count: int) -> dict[str, Tensor]:
    """The rows of a micro-batch that one of several ranks computes; in order, as evenly as can be.

    A rank that none is left for gets the first row with nothing to predict in it: it computes along with the others.

    :param batch: tensors; those with as many rows as ``labels`` are divided
    """
    rows = len(batch["labels"])
    first, end = rows * rank // count, rows * (rank + 1) // count
    idle = first == end
    part = slice(0, 1) if idle else slice(first, end)
    own = {key: value[part] if value.ndim and len(value) == rows else value for key, value in batch.items()}
    if idle:
        own["labels"] = torch.full_like(own["labels"], IGNORED_LABEL)
    return own


@torch.no_grad()
def add_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Add gradients up over ranks, in place, and the loss. One that no rank has stays None.

    :param loss: zero-dimensional fp32
    :returns: the sum
    """
    have = [p.grad is not None for p in parameters]
    header = torch.cat([loss.detach().float().view(1), torch.tensor(have, dtype=torch.float32, device=loss.device)])
    dist.all_reduce(header)
    counts = header[1:].tolist()
    reached = [p for p, count in zip(parameters, counts, strict=True) if count]
    for bucket in _buckets(reached):
        sizes = [p.numel() for p in bucket]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).view(-1).float() for p in bucket])
        dist.all_reduce(flat)
        for parameter, part in zip(bucket, flat.split(sizes), strict=True):
            part = part.view_as(parameter)
            if parameter.grad is None:
                parameter.grad = part.to(parameter.dtype, copy=True)
            else:
                parameter.grad.copy_(part)
    return header[0]


def gradient_norm(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """The norm of all gradients together, in fp32 whatever their dtype is: zero-dimensional."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=device)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


@contextmanager
def drawing_alike(seed: int, step: int, device: torch.device, part: int = 0) -> Iterator[None]:
    """Within the context torch's generator draws a function of these numbers; afterwards it goes on as before."""
    with forked_generators(device):
        torch.manual_seed((seed * 1_000_003 + step) * 65_537 + part)
        yield


def name_number(name: str) -> int:
    """A number for a tensor of this name: by names, tensors that are not trained do not change those of the others."""
    return zlib.crc32(name.encode())


def forked_generators(device: torch.device) -> AbstractContextManager[None]:
    """torch's generators of main memory and one device are afterwards as they were; no other device is touched."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)
