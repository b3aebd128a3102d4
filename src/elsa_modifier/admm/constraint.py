"""The sparse set, and how it tightens over a run: how many entries of each weight a projection keeps at a step.

Taking all pruned weights to zero at once costs more than a run can mend where most of them go. So the set may begin as
the whole space and shrink, as in gradual pruning (Zhu and Gupta, arXiv 1710.01878); an entry that was left out early
comes back as soon as its score is large enough.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from elsa_modifier.admm.budget import SharedBudget, check_limits, shared_keeps
from elsa_modifier.admm.projection import MaskStructure, projection_scores
from elsa_modifier.admm.thresholds import Demand

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
    """

    def __init__(
        self, weights: Sequence[PrunedWeight], schedule: SparsitySchedule, budget: SharedBudget | None = None
    ) -> None:
        self.weights = weights
        self.schedule = schedule
        self.budget = budget
        self._sizes = [w.size for w in weights]
        for w in weights if budget is not None else []:
            if not w.structure.is_unstructured:
                raise ValueError(
                    f"{w.name} has mask structure {w.structure}, which decides how many entries it keeps; a budget is "
                    "shared by unstructured weights only: leave the budget or the structure out"
                )

    def check(self) -> None:
        """Refuse a budget that cannot be met, also where the schedule leaves all at first.

        :raises ValueError: says what to widen
        """
        if self.budget is not None:
            demand = self.demand(self.schedule.steps, range(len(self.weights)))
            check_limits(self._sizes, sum(w.keep for w in self.weights), demand.fewest, demand.most)

    def demand(self, step: int, sharing: Sequence[int]) -> Demand:
        """How many entries each weight may keep after a step.

        :param step: optimizer steps taken
        :param sharing: numbers of the weights that take part in a shared budget; the others keep what they bring
        """
        tightness = self.schedule(step)
        pairs = zip(self.weights, self._sizes, strict=True)
        own = [size - round(tightness * (size - w.keep)) for w, size in pairs]
        if self.budget is None:
            return Demand(own, own)
        fewest, most = self.budget.limits(self._sizes, tightness)
        keeps = [min(max(keep, least), limit) for keep, least, limit in zip(own, fewest, most, strict=True)]
        brought = sum(own[i] for i in sharing)
        least, limit = sum(fewest[i] for i in sharing), sum(most[i] for i in sharing)
        if tightness < 1 or len(sharing) < len(self.weights):
            # Floor and cap may leave those that share, or rounding, no way to meet what all were asked for.
            brought = min(max(brought, least), limit)
        shares = set(sharing)
        # What has no choice takes no part.
        brought -= sum(fewest[i] for i in shares if fewest[i] == most[i])
        return Demand(
            [fewest[i] if i in shares else keep for i, keep in enumerate(keeps)],
            [most[i] if i in shares else keep for i, keep in enumerate(keeps)],
            brought,
        )

    def keeps(self, demand: Demand, scores: Callable[[int], Tensor]) -> list[int]:
        """Entries that each weight keeps, of weights in main memory of which this process has all.

        :param scores: of a weight by its number, as :func:`~elsa_modifier.admm.budget.shared_keeps` asks for them;
            only a shared budget does
        :raises ValueError: for scores that are not finite
        """
        kept = list(demand.fewest)
        choosing = [i for i, (least, most) in enumerate(zip(kept, demand.most, strict=True)) if least < most]
        if choosing:
            shares = shared_keeps(
                lambda position: scores(choosing[position]),
                [self._sizes[i] for i in choosing],
                demand.total,
                [demand.fewest[i] for i in choosing],
                [demand.most[i] for i in choosing],
            )
            for i, share in zip(choosing, shares, strict=True):
                kept[i] = share
        return kept

    def magnitudes(self, number: int) -> Tensor:
        """What the entries of a weight are ranked by when nothing but their magnitudes is known."""
        return projection_scores(self.weights[number].weight.detach().float())
