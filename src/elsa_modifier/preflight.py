"""What is looked at before the first step: how processes were started, the recipe's patterns, the model's values."""

import difflib
import os
from collections.abc import Mapping, Sequence

import torch
from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.utils.match import is_match
from torch import Tensor, nn

from elsa_modifier.targets import Target
from elsa_modifier.training.ranks import launched_ranks

__all__ = ["check_values", "frozen_parameters", "refuse_launchers", "refuse_on_ranks", "refuse_unmatched"]

# How torchrun, MPI (PMI, Open MPI, MVAPICH), SLURM's srun and LSF's jsrun tell a process how many there are.
_PROCESS_COUNTS = (
    "WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "JSM_NAMESPACE_SIZE",
)
_NAMED_AT_MOST = 5


def refuse_launchers(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to be one of several processes that cannot find each other: all would train, and write one directory.

    :raises ValueError: if the environment says that there are several, and torch.distributed could not join them
    """
    if launched_ranks(environment) > 1:
        return
    counts = {name: int(environment[name]) for name in _PROCESS_COUNTS if environment.get(name, "").isdecimal()}
    for name, count in counts.items():
        if count > 1:
            raise ValueError(
                f"{name} is {count}, and RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, by which torch.distributed "
                f"would join {count} processes, are not all set: every one of them would train and write output_dir. "
                "Start it with torchrun, as in examples/multi_gpu, or unset the variable if it is left from another run"
            )


def refuse_on_ranks(
    modifiers: Sequence[object], *, whole_gradients_released: bool, offloaded: bool, ranks: int
) -> None:
    """Refuse what is not possible in several processes.

    :param modifiers: of the recipe
    :param whole_gradients_released: whether a step is to be taken as soon as a gradient is there, of the whole weight
    :param offloaded: whether moments and ADMM state are to be in main memory
    :param ranks: how many there are
    :raises ValueError: for another modifier in the recipe, such gradient release, or offloading
    """
    if ranks == 1:
        return
    if len(modifiers) > 1:
        names = ", ".join(type(modifier).__name__ for modifier in modifiers)
        raise ValueError(
            f"the recipe has {names}, and there are {ranks} processes: after ELSAModifier only the first has the whole "
            "model for certain. Prune with ELSAModifier alone, then run the others on what was saved, without torchrun"
        )
    if whole_gradients_released:
        raise ValueError(
            f"gradient_release is true, parallel 'ddp', and there are {ranks} processes: a gradient would have to be "
            "added up over all of them by itself, as soon as it is there. Use parallel 'fsdp', which does that anyway, "
            "or set gradient_release to false"
        )
    if offloaded:
        raise ValueError(
            f"offload_state is true, and there are {ranks} processes, which share moments and ADMM state between them: "
            "leave it out"
        )


def refuse_unmatched(model: nn.Module, **fields: Sequence[str]) -> None:
    """Refuse names, classes and ``re:`` patterns that match no module of the model: typing errors.

    ``lm_head`` is none: recipes say it for every model, whatever its head is called.

    :param fields: entries by what errors call the field
    :raises ValueError: names each entry, and what is most like it in the model
    """
    modules = dict(model.named_modules())
    known = [*modules, *{type(module).__name__: None for module in modules.values()}]
    for field, entries in fields.items():
        hints = []
        for entry in entries:
            if entry == "lm_head" or any(is_match(name, module, entry) for name, module in modules.items()):
                continue
            text = entry.removeprefix("re:")
            near = [name for name in known if text in name][:3] or difflib.get_close_matches(text, known, cutoff=0.5)
            hints.append(f"{entry!r}" + (f" (the model has {', '.join(near)})" if near else ""))
        if hints:
            raise ValueError(
                f"{field} has entries that match no module of the model: {'; '.join(hints)}. Correct or remove them. "
                "An entry is a module's whole name, a class, or 're:' and a pattern that fits from the name's beginning"
            )


def check_values(model: nn.Module) -> None:
    """Refuse a model that is broken already.

    Buffers may be infinite, as causal masks are.

    :raises ValueError: names parameters with an entry that is not finite, and buffers with one that is not a number
    """
    with OffloadCache.disable_onloading():
        broken = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
        broken += [name for name, buffer in model.named_buffers() if _extremes(buffer).isnan().any()]
    if broken:
        more = f" and {len(broken) - _NAMED_AT_MOST} more" if len(broken) > _NAMED_AT_MOST else ""
        raise ValueError(
            "the model has values that are NaN or infinite before the first step, in "
            f"{', '.join(broken[:_NAMED_AT_MOST])}{more}: load it anew, in a dtype that its checkpoint's values fit"
        )


def frozen_parameters(model: nn.Module, targets: Sequence[Target]) -> frozenset[str]:
    """Names of the floating-point parameters that the user froze: ``requires_grad`` is False.

    To be asked before other modifiers run, which make parameters anew, without gradients.

    :param targets: to be pruned, which is training, and so cannot be frozen
    :raises ValueError: names the targets whose weight is
    """
    with OffloadCache.disable_onloading():
        parameters = model.named_parameters(remove_duplicate=False)
        frozen = frozenset(name for name, p in parameters if p.is_floating_point() and not p.requires_grad)
    if names := [t.name for t in targets if f"{t.name}.weight" in frozen]:
        more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
        raise ValueError(
            f"targets matches {', '.join(names[:_NAMED_AT_MOST])}{more}, whose weights are frozen (requires_grad is "
            "False), and pruning trains them: list them in ignore, or set requires_grad to True"
        )
    return frozen


def _is_finite(tensor: Tensor) -> bool:
    return bool(_extremes(tensor).isfinite().all())


def _extremes(tensor: Tensor) -> Tensor:
    """Smallest and largest entry, either NaN if any is: without a temporary of the tensor's size."""
    values = tensor.detach()
    if not values.is_floating_point() or values.is_meta or values.numel() == 0:
        return torch.zeros(2)
    return torch.stack(torch.aminmax(values if values.dtype.itemsize > 1 else values.float())).float()
