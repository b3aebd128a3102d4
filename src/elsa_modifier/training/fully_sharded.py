"""A run in which each rank holds a part of every matrix: FSDP2, torch's ``fully_shard``, around a copy of the model.

Rows of each matrix are spread over the ranks, and gathered for the time that a layer computes. Optimizers, ADMM and its
projections see none of that: what they step is an ordinary parameter, the rank's own rows, that shares its memory with
FSDP's. Vectors (norms, biases) are few, and every rank has them whole.

The model of the caller is not wrapped, and keeps its values until the trained ones are written to it.
"""

import copy
import dataclasses
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from elsa_modifier.admm.bitmask import pack_bits
from elsa_modifier.admm.rounding import Place
from elsa_modifier.admm.selection import Shards
from elsa_modifier.admm.state import ADMMState
from elsa_modifier.training.layers import decoder_layers
from elsa_modifier.training.loading import is_placeholder
from elsa_modifier.training.model_state import embed_in_fp32, trained_dtype
from elsa_modifier.training.objective import Objective
from elsa_modifier.training.parallel import Replicated, add_gradients, drawing_alike, gradient_norm, name_number
from elsa_modifier.training.precision import teacher_dtype
from elsa_modifier.training.ranks import Ranks

__all__ = ["FullySharded", "sharded_copy"]


class FullySharded(Replicated):
    """Each rank holds rows of every matrix, and of what the optimizer and ADMM hold for it.

    :param original: in main memory; on ranks but the first its parameters may be placeholders
    :param dtype: what matrices are held in
    :param autocast: whether the model computes in bf16
    :param frozen: names of parameters that are not trained
    """

    def __init__(
        self,
        original: PreTrainedModel,
        ranks: Ranks,
        seed: int,
        *,
        dtype: torch.dtype,
        autocast: bool,
        frozen: AbstractSet[str],
    ) -> None:
        self.original = original
        self.ranks = ranks
        self.is_first = ranks.is_first
        self._seed = seed
        self._mesh = DeviceMesh(ranks.device.type, torch.arange(ranks.count))
        self.model = sharded_copy(original, ranks, self._mesh, dtype=dtype, autocast=autocast, frozen=frozen)
        self._local: dict[int, nn.Parameter] = {}
        self._sharded: list[nn.Parameter] = []
        self._whole: list[nn.Parameter] = []
        self.parameters: list[nn.Parameter] = []

    def begin(self) -> None:
        """As :meth:`Alone.begin`.

        :raises ValueError: if this torch cannot add up gradients that only some ranks have
        """
        super().begin()
        # Experts that only some ranks have tokens for must not be left out by the others, which would wait forever.
        if not hasattr(self.model, "set_reduce_scatter_unused_params"):
            raise ValueError(
                f"parallel is 'fsdp', and FSDP of torch {torch.__version__} cannot add up gradients that only some "
                "processes have; upgrade torch (2.13 can), or set parallel to 'ddp'"
            )
        self.model.set_reduce_scatter_unused_params(True)
        # FSDP has given shards their places in memory when the model ran for the first time.
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                continue
            parameter.grad = None
            # mypy takes a parameter that is a DTensor for no parameter any more.
            part = parameter.to_local().detach() if isinstance(parameter, DTensor) else None
            own = parameter if part is None else nn.Parameter(part)
            (self._whole if part is None else self._sharded).append(parameter)
            self._local[id(parameter)] = self._local[id(own)] = own
            self.parameters.append(own)
        self.shards = Shards(
            self.ranks.rank, self.ranks.count, self.ranks.add, scores=sum(p.numel() for p in self._sharded)
        )

    def local(self, parameter: nn.Parameter) -> nn.Parameter:
        return self._local[id(parameter)]

    def places(self) -> list[Place]:
        whole = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        return [Place(name_number(name), self._first_entry(p), p.numel()) for name, p in whole]

    def _first_entry(self, parameter: nn.Parameter) -> int:
        if not isinstance(parameter, DTensor):
            return 0
        rows = parameter.shape[0]
        return min(self.ranks.rank * -(-rows // self.ranks.count), rows) * (parameter.numel() // rows)

    def teacher(self) -> PreTrainedModel:
        dtype = teacher_dtype(self.ranks.device)
        made = sharded_copy(self.original, self.ranks, self._mesh, dtype=dtype, autocast=False)
        for parameter in made.parameters():
            # In place: what is gathered are views of these tensors.
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            own.detach().copy_(own.detach().to(trained_dtype(parameter, torch.bfloat16)))
        embed_in_fp32(made)
        return made

    def objective(self, objective: Objective) -> Objective:
        teacher = getattr(objective, "teacher", None)

        def sharded(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
            # A loss in chunks differentiates on the way forward. That is no backward pass: nothing is to be sent yet.
            self._end_backward_passes(False)
            try:
                loss = objective(model, batch)
            finally:
                self._end_backward_passes(True)
            if isinstance(teacher, FSDPModule):
                teacher.reshard()
            return loss

        return sharded

    def _end_backward_passes(self, end: bool) -> None:
        model: Any = self.model
        model.set_requires_gradient_sync(end)
        model.set_reshard_after_backward(end)
        model.set_is_last_backward(end)

    @torch.no_grad()
    def collect_gradients(self, loss: Tensor) -> Tensor:
        for parameter in self._sharded:
            self.take_gradient(parameter)
        return add_gradients(self._whole, loss)

    @torch.no_grad()
    def total_norm(self) -> Tensor:
        device = self.ranks.device
        parts = gradient_norm([self.local(parameter) for parameter in self._sharded], device)
        return (self.sum_of_parts(parts.square()) + gradient_norm(self._whole, device).square()).sqrt()

    def hooked(self) -> list[nn.Parameter]:
        return self._sharded

    def take_gradient(self, hooked: nn.Parameter) -> nn.Parameter:
        own = self.local(hooked)
        if own is not hooked:
            gradient = hooked.grad
            own.grad = gradient.to_local() if isinstance(gradient, DTensor) else None
            hooked.grad = None
        return own

    def finish_gradients(self) -> list[nn.Parameter]:
        add_gradients(self._whole, torch.zeros((), device=self.ranks.device))
        return self._whole

    def sum_of_parts(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    def drawing(self, step: int) -> AbstractContextManager[None]:
        # Rows of their own get noise of their own.
        return drawing_alike(self._seed, step, self.ranks.device, part=1 + self.ranks.rank)

    def whole_bits(self, state: ADMMState, parameter: nn.Parameter) -> Tensor:
        return pack_bits(_whole(state.mask.to(torch.uint8), parameter, self._mesh).bool())

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the original the trained values, a tensor at a time; a rank's placeholders stay what they are."""
        for before, after in zip(self.original.parameters(), self.model.parameters(), strict=True):
            if not after.requires_grad:
                continue
            values = after.full_tensor() if isinstance(after, DTensor) else after
            if not is_placeholder(before):
                before.data.copy_(values)


def sharded_copy(
    model: PreTrainedModel,
    ranks: Ranks,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    autocast: bool,
    frozen: AbstractSet[str] | None = None,
) -> PreTrainedModel:
    """A copy of the first rank's ``model``, its matrices in ``dtype`` and spread over the ranks.

    No rank has more of it at a time on its device than its shards and one layer, or what lies outside of layers.

    :param autocast: gather the layers' matrices in bf16, in which they are going to be used
    :param frozen: names of parameters that need no gradients; None is all of them, in evaluation mode
    """
    values: dict[int, Tensor] = {}
    memo: dict[int, Any] = {id(b): b.to(ranks.device, copy=True) for b in model.buffers()}
    for name, parameter in model.named_parameters():
        to = trained_dtype(parameter, dtype) if parameter.is_floating_point() else parameter.dtype
        trained = frozen is not None and parameter.is_floating_point() and name not in frozen
        memo[id(parameter)] = nn.Parameter(torch.empty(0, dtype=to, device=ranks.device), requires_grad=trained)
        values[id(memo[id(parameter)])] = parameter.detach()
    made = copy.deepcopy(model, memo=memo)
    for buffer in made.buffers():
        dist.broadcast(buffer, src=0)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    in_bf16 = dataclasses.replace(policy, param_dtype=torch.bfloat16 if autocast else None)
    for module in [*decoder_layers(made), made]:
        for parameter in module.parameters():
            if (value := values.pop(id(parameter), None)) is not None:
                whole = torch.empty(value.shape, dtype=parameter.dtype, device=ranks.device)
                if ranks.is_first:
                    whole.copy_(value)
                dist.broadcast(whole, src=0)
                parameter.data = whole
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy if module is made else in_bf16,
            ignored_params={p for p in module.parameters() if p.ndim < 2 or not p.is_floating_point()},
            # What lies outside of layers is needed at both ends of a pass.
            reshard_after_forward=module is not made,
        )
    sharded: Any = made
    # The loss is divided by the tokens of the global batch; what ranks have found of its gradient adds up.
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return made if frozen is not None else made.eval()


def _whole(local: Tensor, parameter: nn.Parameter, mesh: DeviceMesh) -> Tensor:
    """All rows of a tensor that has the shape of a sharded parameter."""
    if not isinstance(parameter, DTensor):
        return local
    spread = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return spread.full_tensor()
