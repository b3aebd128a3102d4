"""Projection of weights whose rows lie on several ranks: every threshold at once, by adding up counts.

A weight's threshold is found digit by digit, the highest bits of its scores first: each rank counts its scores by
digit, the counts of all weights are added up in one go, and the digit in which the ``keep``-th largest score lies is
the next one of the threshold. So a projection makes a handful of sums over ranks, however many weights there are, and
what they add up is counts, not scores. An ``N:M`` group lies in one row, and a row on one rank: it takes no sum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from elsa_modifier.admm.bitscan import HIGHEST, fault_of, histogram, mask_from, score_bits
from elsa_modifier.admm.constraint import PrunedWeight
from elsa_modifier.admm.projection import MaskStructure, scores_beyond_pattern, sparse_mask
from elsa_modifier.admm.selection import Shards, bin_bits, fault_message

__all__ = ["Cut", "Select", "find_cuts", "select_masks"]

Select = Callable[[Tensor], Tensor]
"""From the scores of this rank's part of a weight to the mask of its kept entries, bool, the same shape."""

_BITS = HIGHEST.bit_length()


@dataclass(frozen=True)
class Cut:
    """Which of a shard's scores are among the largest of all shards.

    :param bits: of the smallest score that is kept
    :param surplus: how many of this shard's scores that equal it are not, the last ones
    """

    bits: int
    surplus: int

    def __call__(self, scores: Tensor) -> Tensor:
        """Boolean mask of the kept entries, the shape of ``scores``."""
        return mask_from(score_bits(scores), self.bits, self.surplus).view_as(scores)


def select_masks(
    weights: Sequence[PrunedWeight], scores: Callable[[int], Tensor], keeps: Sequence[int], shards: Shards
) -> list[Select]:
    """How the mask of each weight is chosen from its scores.

    :param scores: of this rank's part of a weight, by number; asked for several times, and must be the same each time
    :param keeps: how many entries of each whole weight stay
    :raises ValueError: on every shard, for scores that are negative or not finite, or an impossible number to keep
    """
    if shards.count == 1:
        return [partial(sparse_mask, keep=k, structure=w.structure) for w, k in zip(weights, keeps, strict=True)]
    # As long as an N:M structure keeps what its pattern leaves, each row decides for itself.
    patterned = [
        not w.structure.is_unstructured and k <= w.left_by_pattern for w, k in zip(weights, keeps, strict=True)
    ]
    cut = [i for i, alone in enumerate(patterned) if not alone]

    def source(number: int) -> Tensor:
        structure = weights[number].structure
        found = scores(number)
        return found if structure.is_unstructured else scores_beyond_pattern(found, structure)

    cuts = find_cuts(
        [partial(source, i) for i in cut], [keeps[i] for i in cut], shards, names=[weights[i].name for i in cut]
    )
    selects: list[Select] = [partial(sparse_mask, keep=0, structure=w.structure) for w in weights]
    for number, found in zip(cut, cuts, strict=True):
        structure = weights[number].structure
        selects[number] = found if structure.is_unstructured else partial(_after_pattern, found, structure)
    return selects


def _after_pattern(cut: Cut, structure: MaskStructure, scores: Tensor) -> Tensor:
    return cut(scores_beyond_pattern(scores, structure))


def find_cuts(
    sources: Sequence[Callable[[], Tensor]], keeps: Sequence[int], shards: Shards, *, names: Sequence[str] | None = None
) -> list[Cut]:
    """For each tensor, whose scores lie in shards, the cut that keeps exactly as many of them as asked for.

    Ties go to the lower rank, and there to the lower index: to the lower index of the whole, if shards are in order.

    :param sources: for each tensor, what gives this shard's scores, fp32 of any shape, without a sign, perhaps empty;
        called for one tensor at a time, once a round
    :param keeps: how many of each tensor's scores, over all shards
    :param names: of the tensors, for errors
    :raises ValueError: on every shard, for scores that are negative or not finite, or a ``keep`` outside [0, n]
    """
    if not sources:
        return []
    named = names or [f"tensor {i}" for i in range(len(sources))]
    wanted = torch.tensor(keeps)
    low = torch.zeros(len(sources), dtype=torch.int64)
    above = torch.zeros_like(low)
    local = torch.zeros_like(low)
    width = _BITS
    step = bin_bits(len(sources), shards)
    while width:
        shift = max(0, width - step)
        counts = torch.stack(
            [_digits(source(), int(start), width, shift) for source, start in zip(sources, low.tolist(), strict=True)]
        )
        whole = shards.add(counts)
        if width == _BITS:
            _refuse(whole, wanted, named)
        counts, whole = counts[:, :-2], whole[:, :-2]
        # How many scores are in a bin or above it.
        reach = whole.flip(1).cumsum(1).flip(1) + above[:, None]
        # The highest bin that reaches; one is enough for nothing to keep, which is seen to below.
        chosen = ((reach >= wanted.clamp(min=1)[:, None]).sum(dim=1) - 1).clamp(min=0)[:, None]
        local = counts.gather(1, chosen)[:, 0]
        above = (reach.gather(1, chosen) - whole.gather(1, chosen))[:, 0]
        low += chosen[:, 0] << shift
        width = shift
    ties = torch.zeros(shards.count, len(sources), dtype=torch.int64)
    ties[shards.rank] = local
    before = shards.add(ties)[: shards.rank].sum(dim=0)
    kept = torch.minimum((wanted - above - before).clamp(min=0), local)
    return [
        Cut(bits, surplus) if keep else Cut(HIGHEST + 1, 0)
        for bits, surplus, keep in zip(low.tolist(), (local - kept).tolist(), keeps, strict=True)
    ]


def _digits(scores: Tensor, low: int, width: int, shift: int) -> Tensor:
    """Counts of the scores from ``low`` by their digit, then of tensors that are not finite, or negative, here."""
    bits = score_bits(scores)
    high = low + (1 << width) - 1
    counts = torch.zeros((1 << (width - shift)) + 2, dtype=torch.int64)
    found = histogram(bits, low, min(high, HIGHEST), shift)
    counts[: len(found)] = found
    # Elsewhere what is outside the digits is counted already.
    if width == _BITS and int(found.sum()) < bits.numel():
        counts[-2 if fault_of(bits) == "not finite" else -1] = 1
    return counts


def _refuse(counts: Tensor, keeps: Tensor, names: Sequence[str]) -> None:
    sizes = counts[:, :-2].sum(dim=1)
    for name, size, keep, (infinite, negative) in zip(
        names, sizes.tolist(), keeps.tolist(), counts[:, -2:].tolist(), strict=True
    ):
        if infinite or negative:
            raise ValueError(f"{name}: the scores to project {fault_message('not finite' if infinite else 'negative')}")
        if not 0 <= keep <= size:
            raise ValueError(f"{name}: cannot keep {keep} of {size} weights; allowed is 0 to {size}")
