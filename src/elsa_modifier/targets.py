"""Which weights of a model are pruned, and how sparse each becomes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.utils import match_named_modules
from compressed_tensors.utils.match import is_match
from loguru import logger
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from elsa_modifier.admm.projection import MaskStructure

__all__ = ["Target", "find_targets", "fractions_of"]


@dataclass(frozen=True)
class Target:
    """A module whose ``weight`` is pruned.

    :param name: of the module
    :param keep: how many of the weight's entries stay
    """

    name: str
    module: nn.Module
    keep: int

    @property
    def weight(self) -> nn.Parameter:
        """The module's weight, (out, in); of a Conv1D (in, out)."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight


def find_targets(
    model: PreTrainedModel,
    *,
    targets: Sequence[str],
    ignore: Sequence[str],
    sparsity: float | Mapping[str, float],
    structure: MaskStructure,
) -> list[Target]:
    """The modules to prune, in the model's order, each weight once.

    :param targets: module names, classes, or ``re:`` patterns, as everywhere in llm-compressor
    :param ignore: the same; these stay dense. ``lm_head`` is the output embedding, whatever its class calls it
    :param sparsity: fraction of zeros, for all or by pattern; the first pattern that matches decides, and a target that
        none matches stays dense
    :raises ValueError: if nothing matches, a pattern matches nothing, or a weight does not fit the mask structure, as
        that of a Conv1D, (in, out), never does
    """
    # Without it an offloaded weight would be a new tensor at every look, and what is tied could not be told.
    with OffloadCache.disable_onloading():
        matched = [(n, m, getattr(m, "weight", None)) for n, m in match_named_modules(model, targets, ignore)]
        head = model.get_output_embeddings() if "lm_head" in ignore else None
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    unmatched = set(sparsity) if isinstance(sparsity, Mapping) else set()
    seen: set[int] = set()
    found = []
    for name, module, weight in matched:
        if module is head:
            continue
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(
                f"targets matches {name} ({type(module).__name__}), which has no floating-point weight matrix; "
                "name only Linear modules in targets, or list this one in ignore"
            )
        if isinstance(module, Conv1D) and not structure.is_unstructured:
            raise ValueError(
                f"mask_structure is {structure}, but {name} is a Conv1D, whose weight is (in, out), so the "
                "pattern would not lie along its inputs; leave mask_structure out"
            )
        if id(weight) in embeddings:
            logger.warning(f"{name} shares its weight with an embedding and stays dense.")
            continue
        if isinstance(sparsity, Mapping):
            pattern = next((p for p in sparsity if is_match(name, module, p)), None)
            if pattern is None:
                continue
            unmatched.discard(pattern)
            fraction = sparsity[pattern]
        else:
            fraction = sparsity
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        found.append(Target(name, module, _entries_to_keep(name, weight.shape, fraction, structure)))
    if unmatched:
        raise ValueError(f"sparsity has patterns that match no target: {sorted(unmatched)}; correct or remove them")
    if not found:
        hint = ""
        if any(isinstance(m, Conv1D) for m in model.modules()):
            hint = "; its matrices are in Conv1D modules, so set targets to [Conv1D]"
        raise ValueError(f"targets {list(targets)} without ignore {list(ignore)} match no module of the model{hint}")
    return found


def fractions_of(
    targets: Sequence[Target], field: str, value: float | Mapping[str, float], *, default: float
) -> list[float]:
    """A fraction for each target: the same for all, or that of the first pattern that matches, or the default.

    :param field: what errors call it
    :raises ValueError: if a pattern matches no target
    """
    if not isinstance(value, Mapping):
        return [value] * len(targets)
    first = [next((p for p in value if is_match(t.name, t.module, p)), None) for t in targets]
    if unmatched := set(value) - set(first):
        raise ValueError(f"{field} has patterns that match no target: {sorted(unmatched)}; correct or remove them")
    return [default if pattern is None else value[pattern] for pattern in first]


def _entries_to_keep(name: str, shape: Sequence[int], sparsity: float, structure: MaskStructure) -> int:
    rows, columns = shape
    if structure.is_unstructured:
        return rows * columns - round(sparsity * rows * columns)
    if columns % structure.group:
        raise ValueError(
            f"mask_structure {structure} needs input dimensions divisible by {structure.group}, but {name} has "
            f"{columns}; list it in ignore, or use another structure"
        )
    return rows * columns // structure.group * (structure.group - structure.zeroed)
