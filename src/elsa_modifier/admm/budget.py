"""One number of kept entries for many weights, spread over them by one threshold on their scores.

The scores of all weights do not fit in memory together. So they come from a function, one weight at a time, and are
counted (see :mod:`elsa_modifier.admm.selection`); twice for nearly every model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elsa_modifier.admm.bitscan import score_bits
from elsa_modifier.admm.selection import find_threshold

__all__ = ["SharedBudget", "check_limits", "shared_keeps"]


@dataclass(frozen=True)
class SharedBudget:
    """How far the sparsity of one weight may be from the others' when all share one number of kept entries.

    :param floor: the least fraction of zeros of a weight, 0 to 1: one for all, or one for each in order
    :param cap: the largest, ``floor`` to 1, the same
    :raises ValueError: for a fraction outside its range
    """

    floor: float | Sequence[float] = 0.0
    cap: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        for name, value in (("floor", self.floor), ("cap", self.cap)):
            for fraction in [value] if isinstance(value, float | int) else value:
                if not 0 <= fraction <= 1:
                    raise ValueError(f"the budget's {name} is {fraction}; allowed is 0 to 1, a fraction of zeros")

    def limits(self, sizes: Sequence[int], tightness: float = 1.0) -> tuple[list[int], list[int]]:
        """The fewest and the most entries that weights of these sizes keep.

        :param tightness: which part of the zeros is asked for already; the floor rises with it
        :raises ValueError: for a floor above its cap, or another number of fractions than of weights
        """
        floors, caps = self._for_each("floor", self.floor, len(sizes)), self._for_each("cap", self.cap, len(sizes))
        for floor, cap in zip(floors, caps, strict=True):
            if floor > cap:
                raise ValueError(
                    f"the budget's floor is {floor}; allowed is 0 to its cap, {cap}: lower it, or raise cap"
                )
        smallest = [size - round(cap * size) for size, cap in zip(sizes, caps, strict=True)]
        largest = [size - round(tightness * floor * size) for size, floor in zip(sizes, floors, strict=True)]
        return smallest, largest

    @staticmethod
    def _for_each(name: str, value: float | Sequence[float], count: int) -> list[float]:
        fractions = [value] * count if isinstance(value, float | int) else list(value)
        if len(fractions) != count:
            raise ValueError(
                f"the budget's {name} has {len(fractions)} fractions; allowed is one, or one for each of "
                f"the {count} weights"
            )
        return fractions


def check_limits(counts: Sequence[int], total_keep: int, smallest: Sequence[int], largest: Sequence[int]) -> None:
    """Refuse what :func:`shared_keeps` cannot do.

    :raises ValueError: if limits contradict each other or leave no way to keep ``total_keep``
    """
    for i, (least, most, count) in enumerate(zip(smallest, largest, counts, strict=True)):
        if not 0 <= least <= most <= count:
            raise ValueError(
                f"tensor {i} of {count} entries is to keep {least} to {most}; allowed is 0 <= fewest <= most <= {count}"
            )
    if not sum(smallest) <= total_keep <= sum(largest):
        raise ValueError(
            f"total_keep is {total_keep}; allowed is {sum(smallest)} to {sum(largest)}, the sums of the fewest and the "
            "most entries that each tensor may keep: change total_keep, or widen the tensors' limits"
        )


def shared_keeps(
    scores: Callable[[int], Tensor],
    sizes: Sequence[int],
    total_keep: int,
    smallest: Sequence[int],
    largest: Sequence[int],
) -> list[int]:
    """How many entries each tensor keeps: those with scores above one threshold, within the tensor's own limits.

    The sum is exactly ``total_keep``. Scores that equal the threshold are kept by earlier tensors first.

    :param scores: gives the scores of tensor ``i``, fp32 of any shape, without a sign; called for each tensor in turn,
        twice unless the scores are unusual, and must give the same each time
    :param sizes: how many entries ``scores(i)`` has
    :param smallest: the fewest entries that each tensor keeps
    :param largest: the most, no more than it has
    :raises ValueError: if limits contradict each other or leave no way to keep ``total_keep``, or for scores that are
        negative or not finite
    """
    check_limits(sizes, total_keep, smallest, largest)

    def source(i: int) -> Callable[[], Tensor]:
        return lambda: score_bits(scores(i))

    sources = [source(i) for i in range(len(sizes))]
    found = find_threshold(sources, sizes, total_keep, smallest, largest)
    above, ties = found.above, found.ties
    bounds = torch.tensor(smallest), torch.tensor(largest)
    keeps = above.clamp(*bounds)
    tied = (above + ties).clamp(*bounds) - keeps
    # What the budget leaves for a tensor's ties, after those of the tensors before it.
    left = total_keep - int(keeps.sum()) - (tied.cumsum(0) - tied)
    kept: list[int] = (keeps + torch.minimum(tied, left.clamp(min=0))).tolist()
    return kept
