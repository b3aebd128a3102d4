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

from elsa_modifier.admm.optimizer import ADMMOptimizer
from elsa_modifier.resuming.manifest import Manifest
from elsa_modifier.resuming.packed import Mask, Packed, Pair, packed_moment, part_of, placed_as
from elsa_modifier.resuming.storage import load_tensors

__all__ = ["Local", "itself", "load_state", "run_tensors"]

Local = Callable[[nn.Parameter], nn.Parameter]
"""From a parameter of the model, perhaps a DTensor, to what this rank's optimizer steps of it: an ordinary parameter,
which shares its memory with the rank's part."""

# What wrappers of modules put into names.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")


def itself(parameter: nn.Parameter) -> nn.Parameter:
    """The :data:`Local` of a process that has all of the model."""
    return parameter


def run_tensors(model: nn.Module, optimizer: ADMMOptimizer, local: Local = itself) -> dict[str, Tensor]:
    """All tensors of a run but the random generators' states; most are the run's own memory."""
    optimizer.kept.synchronize()
    tensors = _weights(model)
    for name, parameter, _, held in _states(model, optimizer, local):
        if isinstance(held, Packed):
            tensors |= {f"{name}.{part}": tensor for part, tensor in held.tensors().items()}
        else:
            tensors[name] = _whole(held, parameter)
    return tensors


def load_state(
    model: nn.Module,
    optimizer: ADMMOptimizer,
    directory: Path,
    manifest: Manifest,
    *,
    local: Local = itself,
    group: ProcessGroup | None = None,
) -> None:
    """Put a checkpoint's weights, moments and ADMM states into a run whose optimizer has taken no step.

    :param manifest: of the directory, verified
    :raises CheckpointDamaged: if the checkpoint lacks something
    :raises ValueError: if what it has cannot be parted among this number of ranks
    """
    begun = [local(p) for n, p in _trained(model) if f"moments.{n}.step" in manifest.tensors]
    _begin_moments(optimizer, begun)
    targets = _weights(model)
    # After reading, in order: what a pair's bytes mean depends on the mask, which comes before it.
    finish: list[Callable[[], None]] = []
    for name, parameter, moments, held in _states(model, optimizer, local):
        if isinstance(held, Packed):
            read, then = _reading(name, held, manifest)
            targets |= read
            finish += [partial(_at_its_place, optimizer, local(parameter), action) for action in then]
            continue
        targets[name] = _whole(held, parameter)
        if isinstance(held, int):
            finish.append(partial(_set_count, moments, name.rpartition(".")[2], targets[name]))
    load_tensors(targets, directory, manifest, group)
    for action in finish:
        action()
    optimizer.kept.synchronize()


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


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained, each once, by the names that they have in the model without wrappers."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return [(_plain(name), p) for name, p in inner.named_parameters() if p.requires_grad]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"weights.{name}": p.detach() for name, p in _trained(model)}


def _states(
    model: nn.Module, optimizer: ADMMOptimizer, local: Local
) -> Iterator[tuple[str, nn.Parameter, dict[str, Any], Packed | Tensor | int]]:
    """Name, the model's parameter, the optimizer's state of it and what is held, of moments and ADMM states."""
    parameter_of: dict[int, nn.Parameter] = {}
    for name, parameter in _trained(model):
        own = local(parameter)
        parameter_of[id(own)] = parameter
        moments: dict[str, Any] = optimizer.base.state.get(own) or {}
        for key, held in moments.items():
            packed = packed_moment(parameter, held)
            # The same name from a rank whose part is too small to be packed.
            plain = f"moments.{name}.{key}" + (".values" if isinstance(held, Tensor) and held.ndim else "")
            yield (f"moments.{name}.{key}", parameter, moments, packed) if packed else (plain, parameter, moments, held)
    for pruned, state in zip(optimizer.weights, optimizer.states, strict=True):
        parameter, name = parameter_of[id(pruned.weight)], f"admm.{_plain(pruned.name)}"
        yield f"{name}.mask", parameter, {}, Mask(parameter, state)
        if state.pair_parts:
            yield f"{name}.pair", parameter, {}, Pair(parameter, state)


def _whole(held: Tensor | int, parameter: nn.Parameter) -> Tensor:
    """What is held in full precision, as the tensor that all ranks have together."""
    if isinstance(held, int):
        return torch.tensor(held)
    return placed_as(parameter, held, tuple(parameter.shape)) if held.ndim and not isinstance(held, DTensor) else held


def _at_its_place(optimizer: ADMMOptimizer, parameter: nn.Parameter, action: Callable[[], None]) -> None:
    with optimizer.kept.here(parameter, changed=True):
        action()


def _begin_moments(optimizer: ADMMOptimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Have the optimizer make its state for these parameters, by a step without a gradient for one after another.

    It changes weights, of which others are read afterwards.
    """
    base = optimizer.base
    group_of = {id(p): group for group in base.param_groups for p in group["params"]}
    groups = base.param_groups
    for parameter in parameters:
        group = group_of[id(parameter)]
        members: list[Any] = group["params"]
        base.param_groups, group["params"] = [group], [parameter]
        parameter.grad = torch.zeros_like(parameter)
        try:
            with optimizer.kept.here(parameter, changed=True):
                base.step()
        finally:
            base.param_groups, group["params"], parameter.grad = groups, members, None
    optimizer.kept.synchronize()


def _set_count(moments: dict[str, Any], key: str, count: Tensor) -> None:
    moments[key] = int(count)


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
