"""The tensors of a run by fully qualified names, and how they get back into a run that has just begun.

Names say the same whatever the number of ranks: ``weights.<parameter>``, ``moments.<parameter>.<key>``,
``admm.<module>.mask`` and ``.pair``. A state in few bits adds the names of its parts; see
:mod:`elsa_modifier.resuming.packed`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from elsa_modifier.admm.optimizer import ADMMOptimizer
from elsa_modifier.resuming.manifest import Manifest
from elsa_modifier.resuming.packed import Mask, Packed, Pair, packed_moment, part_of
from elsa_modifier.resuming.storage import load_tensors

__all__ = ["load_state", "run_tensors", "trained_parameters"]

# What wrappers of modules put into names.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, each once, by the names that they have in the model without wrappers."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return {_plain(name): p for name, p in inner.named_parameters() if p.requires_grad}


def run_tensors(model: nn.Module, optimizer: ADMMOptimizer) -> dict[str, Tensor]:
    """All tensors of a run but the random generators' states; most are the run's own memory."""
    tensors = _weights(model)
    for name, _, held in _states(model, optimizer):
        if isinstance(held, Packed):
            tensors |= {f"{name}.{part}": tensor for part, tensor in held.tensors().items()}
        else:
            tensors[name] = torch.tensor(held) if isinstance(held, int) else held
    return tensors


def load_state(
    model: nn.Module, optimizer: ADMMOptimizer, directory: Path, manifest: Manifest, group: ProcessGroup | None = None
) -> None:
    """Put a checkpoint's weights, moments and ADMM states into a run whose optimizer has taken no step.

    :param manifest: of the directory, verified
    :raises CheckpointDamaged: if the checkpoint lacks something
    :raises ValueError: if what it has cannot be parted among this number of ranks
    """
    begun = [p for n, p in trained_parameters(model).items() if f"moments.{n}.step" in manifest.tensors]
    _begin_moments(optimizer.base, begun)
    targets = _weights(model)
    # After reading, in order: what a pair's bytes mean depends on the mask, which comes before it.
    finish: list[Callable[[], None]] = []
    for name, parameter, held in _states(model, optimizer):
        if isinstance(held, int):
            count = targets[name] = torch.tensor(held)
            moments, key = optimizer.base.state[parameter], name.rpartition(".")[2]
            finish.append(partial(_set_count, moments, key, count))
        elif isinstance(held, Packed):
            read, then = _reading(name, held, manifest)
            targets |= read
            finish += then
        else:
            targets[name] = held
    load_tensors(targets, directory, manifest, group)
    for action in finish:
        action()


def _reading(name: str, held: Packed, manifest: Manifest) -> tuple[dict[str, Tensor], list[Callable[[], None]]]:
    """Tensors to read a packed state into, and what to do then."""
    own = {f"{name}.{part}": tensor for part, tensor in held.tensors().items()}
    values = f"{name}.values"
    if values in manifest.tensors:
        empty = torch.empty_like(held.parameter, dtype=getattr(torch, manifest.tensors[values].dtype))
        return {values: empty}, [lambda: held.pack_(empty.to_local() if isinstance(empty, DTensor) else empty)]
    if all(n in manifest.tensors and manifest.tensors[n].shape == tuple(t.shape) for n, t in own.items()):
        return own, []
    whole = held.whole()
    if whole is None:
        raise ValueError(
            f"{name} of the training checkpoint was saved by another number of processes, and cannot be parted among "
            "these; resume with as many as before, or with state_dtype fp32"
        )
    read = {f"{name}.{part}": tensor for part, tensor in whole.tensors().items()}
    return read, [lambda: held.pack_(part_of(held.parameter, whole.unpack()))]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"weights.{name}": p.detach() for name, p in trained_parameters(model).items()}


def _states(model: nn.Module, optimizer: ADMMOptimizer) -> Iterator[tuple[str, Tensor, Packed | Tensor | int]]:
    """Name, parameter and what is held for it, of moments and ADMM states."""
    for name, parameter in trained_parameters(model).items():
        for key, held in (optimizer.base.state.get(parameter) or {}).items():
            packed = packed_moment(parameter, held)
            # The same name from a rank whose part is too small to be packed.
            plain = f"moments.{name}.{key}" + (".values" if isinstance(held, Tensor) and held.ndim else "")
            yield (f"moments.{name}.{key}", parameter, packed) if packed else (plain, parameter, held)
    for pruned, state in zip(optimizer.weights, optimizer.states, strict=True):
        yield f"admm.{_plain(pruned.name)}.mask", pruned.weight, Mask(pruned.weight, state)
        if state.pair_parts:
            yield f"admm.{_plain(pruned.name)}.pair", pruned.weight, Pair(pruned.weight, state)


def _begin_moments(base: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Have the optimizer make its state for these parameters, by a step without a gradient for one after another.

    It changes weights, of which others are read afterwards.
    """
    group_of = {id(p): group for group in base.param_groups for p in group["params"]}
    groups = base.param_groups
    for parameter in parameters:
        group = group_of[id(parameter)]
        members: list[Any] = group["params"]
        base.param_groups, group["params"] = [group], [parameter]
        parameter.grad = torch.zeros_like(parameter)
        try:
            base.step()
        finally:
            base.param_groups, group["params"], parameter.grad = groups, members, None


def _set_count(moments: dict[str, Any], key: str, count: Tensor) -> None:
    moments[key] = int(count)


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
