"""Thresholds of all weights at once, by adding up counts: of weights on an accelerator, or with rows on several ranks.

A weight's threshold is found digit by digit, the highest bits of its scores first: the scores are counted by digit, and
the digit in which the ``keep``-th largest lies is the next one of the threshold. Each round counts all weights, adds
counts up over ranks in one go, and chooses digits where the counts are. So what a projection takes of the ranks is a
handful of sums, of counts and not of scores, however many weights there are; and what it takes of the host is one read,
of how many entries each weight keeps and whether the scores can be ranked.

Weights that share a budget share a threshold, as long as none of them keeps fewer or more entries than it may. One that
would has a threshold of its own from the digit on that shows it: one histogram a weight and round is enough for all.

An ``N:M`` group lies in one row, and a row on one rank: it takes no sum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elsa_modifier.admm.bitscan import HIGHEST, fault_of, histogram, mask_from, score_bits
from elsa_modifier.admm.placement import read
from elsa_modifier.admm.selection import Shards, bin_bits, fault_message

__all__ = ["Counter", "Cut", "Demand", "count_scores", "find_cuts"]

Counter = Callable[[Tensor, int, int], Tensor]
"""From the bits of the lowest score that may be the threshold (zero-dimensional int64), how many bits are not known,
and how many of them this round leaves, to counts by digit, and then of scores that are not finite, and negative."""

_BITS = HIGHEST.bit_length()


@dataclass(frozen=True)
class Demand:
    """How many entries tensors keep: each between its fewest and its most; all that have a choice ``total`` together.

    :param total: of those whose fewest and most are not the same
    """

    fewest: Sequence[int]
    most: Sequence[int]
    total: int = 0

    @property
    def is_shared(self) -> bool:
        """Whether any tensor has a choice."""
        return any(least < most for least, most in zip(self.fewest, self.most, strict=True))


@dataclass(frozen=True)
class Cut:
    """Which of a shard's scores are among the largest of all shards.

    :param bits: of the smallest score that is kept; zero-dimensional int64, or a number in main memory
    :param kept: how many of this shard's scores that equal it are, the first ones; the same
    :param local: how many there are; the same
    """

    bits: Tensor
    kept: Tensor
    local: Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        """Boolean mask of the kept entries, the shape of ``scores``, in main memory."""
        return mask_from(score_bits(scores), int(self.bits), int(self.local - self.kept)).view_as(scores)


def count_scores(scores: Tensor, low: int, width: int, shift: int) -> Tensor:
    """A :data:`Counter` of scores in main memory."""
    bits = score_bits(scores)
    high = low + (1 << width) - 1
    counts = torch.zeros((1 << (width - shift)) + 2, dtype=torch.int64)
    found = histogram(bits, low, min(high, HIGHEST), shift)
    counts[: len(found)] = found
    # Elsewhere what is outside the digits is counted already.
    if width == _BITS and int(found.sum()) < bits.numel():
        counts[-2 if fault_of(bits) == "not finite" else -1] = 1
    return counts


def find_cuts(
    counters: Sequence[Counter],
    demand: Demand,
    shards: Shards,
    device: torch.device,
    *,
    names: Sequence[str] | None = None,
    faults: Tensor | None = None,
) -> tuple[list[Cut], list[int]]:
    """For each tensor the cut that keeps as many scores as asked for, over all shards, and how many those are.

    Ties go to earlier tensors, to the lower rank, and there to the lower index.

    :param counters: of each tensor's scores in this shard; called once a round each
    :param device: where counts are
    :param names: of the tensors, for errors
    :param faults: of further tensors, which are cut otherwise: (tensors, 2), counts of scores that are not finite, and
        negative. Their names come after the others'
    :raises ValueError: on every shard, for scores that are negative or not finite, or more entries to keep than exist
    """
    if not counters and faults is None:
        return [], []
    tensors = len(counters)
    fewest, most = (torch.tensor(counts, dtype=torch.int64, device=device) for counts in (demand.fewest, demand.most))
    sizes = torch.zeros(tensors, dtype=torch.int64, device=device)
    found = torch.zeros(tensors, 2, dtype=torch.int64, device=device)
    target, has_choice = fewest, most > fewest
    left = torch.tensor(demand.total, device=device)
    low, above, local, ties = (torch.zeros(tensors, dtype=torch.int64, device=device) for _ in range(4))
    width = _BITS if tensors else 0
    step = bin_bits(tensors, shards, device)
    while width:
        shift = max(0, width - step)
        counts = torch.stack([counter(low[i], width, shift) for i, counter in enumerate(counters)])
        whole = shards.add(counts)
        if width == _BITS:
            found, sizes = whole[:, -2:], whole[:, :-2].sum(dim=1)
        counts, whole = counts[:, :-2], whole[:, :-2]
        # How many scores are in a digit or above it.
        reach = whole.flip(1).cumsum(1).flip(1) + above.unsqueeze(1)
        if demand.is_shared:
            within = reach.clamp(fewest.unsqueeze(1), most.unsqueeze(1)) * has_choice.unsqueeze(1)
            shared = _lowest_that(within.sum(dim=0, keepdim=True) >= left)
            at = reach.index_select(1, shared)[:, 0]
            over = at - whole.index_select(1, shared)[:, 0]
            is_full, is_short = has_choice & (over >= most), has_choice & (at <= fewest)
            target = torch.where(is_full, most, torch.where(is_short, fewest, target))
            left = left - (target * (is_full | is_short)).sum()
            has_choice = has_choice & ~is_full & ~is_short
        own = _lowest_that(reach >= target.clamp(min=1).unsqueeze(1))
        if demand.is_shared:
            own = torch.where(has_choice, shared, own)
        chosen = own.unsqueeze(1)
        local, ties = counts.gather(1, chosen)[:, 0], whole.gather(1, chosen)[:, 0]
        above = reach.gather(1, chosen)[:, 0] - ties
        low = low + (own << shift)
        width = shift
    # What the budget leaves for a tensor's ties, after those of the tensors before it.
    least = above.clamp(fewest, most)
    tied = ((above + ties).clamp(fewest, most) - least) * has_choice
    rest = left - (least * has_choice).sum() - (tied.cumsum(0) - tied)
    keeps = torch.where(has_choice, least + torch.minimum(tied, rest.clamp(min=0)), target)
    kept = _own_ties(keeps - above, local, shards)
    bits, local = torch.where(keeps > 0, low, HIGHEST + 1), local * (keeps > 0)
    others = found.new_zeros(0, 2) if faults is None else shards.add(faults.long())
    asked = read([keeps, sizes, found[:, 0], found[:, 1], others[:, 0], others[:, 1]])
    _refuse(asked, demand, names)
    return [Cut(*each) for each in zip(bits, kept, local, strict=True)], [int(keep) for keep in asked[0]]


def _lowest_that(reaches: Tensor) -> Tensor:
    """The highest digit that reaches what is asked for: in each row, those up to it do. 0 where none does."""
    return (reaches.sum(dim=1) - 1).clamp(min=0)


def _own_ties(wanted: Tensor, local: Tensor, shards: Shards) -> Tensor:
    """How many of its ties this shard keeps, where lower ranks come first."""
    ties = torch.zeros(shards.count, len(local), dtype=torch.int64, device=local.device)
    ties[shards.rank] = local
    before = shards.add(ties)[: shards.rank].sum(dim=0)
    return torch.minimum((wanted - before).clamp(min=0), local)


def _refuse(asked: list[list[float]], demand: Demand, names: Sequence[str] | None) -> None:
    _, sizes, *faults = asked
    infinite, negative = faults[0] + faults[2], faults[1] + faults[3]
    named = names or [f"tensor {i}" for i in range(len(infinite))]
    for name, has_infinite, has_negative in zip(named, infinite, negative, strict=True):
        if has_infinite or has_negative:
            message = fault_message("not finite" if has_infinite else "negative")
            raise ValueError(f"{name}: the scores to project {message}")
    for name, size, least, most in zip(named, sizes, demand.fewest, demand.most, strict=False):
        if not 0 <= least <= most <= size:
            raise ValueError(f"{name}: cannot keep {most} of {int(size)} weights; allowed is 0 to {int(size)}")
