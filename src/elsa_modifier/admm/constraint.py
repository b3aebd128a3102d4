"""The sparse set, and how it tightens over a run: how many entries of each weight a projection keeps at a step.

Taking all pruned weights to zero at once costs more than a run can mend where most of them go. So the set may begin as
the whole space and shrink, as in gradual pruning (Zhu and Gupta, arXiv 1710.01878); an entry that was left out early
comes back as soon as its score is large enough.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from elsa_modifier.admm.budget import SharedBudget, shared_keeps
from elsa_modifier.admm.projection import MaskStructure, projection_scores
from elsa_modifier.admm.selection import WHOLE, Shards

__all__ = ["Constraint", "PrunedWeight", "SparsitySchedule", "SparsityScheduleName"]

SparsityScheduleName = Literal["constant", "linear", "cubic"]

_POWERS = {"linear": 1, "cubic": 3}


@dataclass(frozen=True)
class PrunedWeight:
    """One weight to prune.

    :param name: what errors and reports call it
    :param weight: contiguous fp32 or bf16 parameter, also among the base optimizer's parameters; on one of several
        ranks that share it, the rank's rows, if any
    :param keep: how many entries stay; with a shared budget, what the weight brings into it
    :param structure: the zero pattern, which must leave ``keep`` entries
    :param entries: of the whole weight, if ``weight`` is a part of it
    """

    name: str
    weight: nn.Parameter
    keep: int
    structure: MaskStructure
    entries: int | None = None

    @property
    def size(self) -> int:
        """Entries of the whole weight."""
        return self.weight.numel() if self.entries is None else self.entries

    @property
    def left_by_pattern(self) -> int:
        """Entries that its N:M structure leaves."""
        return self.structure.left_of(self.size)


@dataclass(frozen=True)
class SparsitySchedule:
    """Which part of the zeros is asked for as a function of the optimizer steps taken.

    :param name: ``constant``, all from the start; ``linear``; or ``cubic``, ``1 - (1 - t/T)^3``, fast at first, while
        what is left out matters little
    :param steps: ``T``, the step from which on all are
    """

    name: SparsityScheduleName = "constant"
    steps: int = 0

    def __call__(self, step: int) -> float:
        if self.name == "constant" or step >= self.steps:
            return 1.0
        return float(1 - (1 - step / self.steps) ** _POWERS[self.name])


class Constraint:
    """How many entries of each of ``weights`` may stay at a step.

    :param budget: None gives each weight its own share of the zeros. Otherwise all together have as many, and one
        threshold on the scores decides how many stay in which weight, between the budget's floor and cap
    :raises ValueError: for a budget that is to be shared with an N:M structure, or cannot be met within its floor and
        cap
    :param shards: how the weights lie over ranks
    """

    def __init__(
        self,
        weights: Sequence[PrunedWeight],
        schedule: SparsitySchedule,
        budget: SharedBudget | None = None,
        shards: Shards = WHOLE,
    ) -> None:
        self.weights = weights
        self.schedule = schedule
        self.budget = budget
        self.shards = shards
        self._sizes = [w.size for w in weights]
        for w in weights if budget is not None else []:
            if not w.structure.is_unstructured:
                raise ValueError(
                    f"{w.name} has mask structure {w.structure}, which decides how many entries it keeps; a budget is "
                    "shared by unstructured weights only: leave the budget or the structure out"
                )

    def by_magnitude(self) -> list[int]:
        """Entries that each weight keeps before the first step, when magnitudes are all that is known."""
        # Also where the schedule leaves all: a budget that cannot be met is refused here.
        kept = self.at(self.schedule.steps, self.magnitudes, range(len(self.weights)))
        return kept if self.schedule(0) == 1.0 else self.at(0, self.magnitudes, range(len(self.weights)))

    def at(self, step: int, scores: Callable[[int], Tensor], sharing: Sequence[int]) -> list[int]:
        """Entries that each weight keeps after a step.

        :param step: optimizer steps taken
        :param scores: of a weight by its number, as :func:`~elsa_modifier.admm.budget.shared_keeps` asks for them;
            only a shared budget does
        :param sharing: numbers of the weights that take part in a shared budget; the others keep what they bring
        :raises ValueError: for scores that are not finite
        """
        tightness = self.schedule(step)
        pairs = zip(self.weights, self._sizes, strict=True)
        own = [size - round(tightness * (size - w.keep)) for w, size in pairs]
        if self.budget is None:
            return own
        fewest, most = self.budget.limits(self._sizes, tightness)
        keeps = [min(max(keep, least), limit) for keep, least, limit in zip(own, fewest, most, strict=True)]
        if not sharing:
            return keeps
        brought = sum(own[i] for i in sharing)
        least, limit = sum(fewest[i] for i in sharing), sum(most[i] for i in sharing)
        if tightness < 1 or len(sharing) < len(self.weights):
            # Floor and cap may leave those that share, or rounding, no way to meet what all were asked for.
            brought = min(max(brought, least), limit)
        shares = shared_keeps(
            lambda position: scores(sharing[position]),
            [self.weights[i].weight.numel() for i in sharing],
            brought,
            [fewest[i] for i in sharing],
            [most[i] for i in sharing],
            self.shards,
        )
        for i, share in zip(sharing, shares, strict=True):
            keeps[i] = share
        return keeps

    def magnitudes(self, number: int) -> Tensor:
        """What the entries of a weight are ranked by when nothing but their magnitudes is known."""
        return projection_scores(self.weights[number].weight.detach().float())
