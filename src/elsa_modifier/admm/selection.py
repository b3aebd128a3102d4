"""The exact k largest of many scores in main memory, in one pass and without a sort: radix selection on bits.

A strided sample brackets the threshold. One pass over the scores then counts what is above the bracket, collects the
little that is inside, and masks the rest. Histograms of what was collected find the threshold itself, by which its part
of the mask is settled. The sample only saves time: if the counts show that the bracket missed, histograms of all scores
decide, and so they do if ties leave too much inside.

Counts add up. So the scores may be those of several tensors that share one threshold, each of which keeps no fewer and
no more entries than it is allowed (see :mod:`elsa_modifier.admm.budget`). What lies elsewhere, on an accelerator or in
shards on several ranks, is for :mod:`elsa_modifier.admm.thresholds`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elsa_modifier.admm.bitscan import HIGHEST, Scan, fault_of, histogram, mask_from, scan, score_bits
from elsa_modifier.admm.placement import is_fused

__all__ = ["WHOLE", "Shards", "Threshold", "bin_bits", "fault_message", "find_threshold", "largest_mask"]

# 2^11 bins take three rounds to tell all floats apart, stay in cache, and are little to add up over ranks. Very many
# tensors get fewer, so that the counts of all of them stay small.
_BIN_BITS = range(6, 12)
_ALL_BIN_BITS = 22
# On an accelerator a round is a pass over the weights; fewer rounds, and more places for what is added at once.
_FUSED_BIN_BITS = 16
_ALL_FUSED_BIN_BITS = 25
# Over ranks as many bytes of counts as these many scores may cost, all tensors together; more rounds are dearer below.
_FEWEST_BIN_BITS = 4
_SCORES_PER_BIN = 64
# How far the ends of the bracket are from where the sample has the threshold. Each misses once in 30,000 times.
_DEVIATIONS = 4.0
# Below this many scores in main memory a partition of a copy is done before the counting has begun.
_PARTITIONED_BELOW = 1 << 20
# Below this many scores a sample is not worth taking.
_SAMPLED_FROM = 1 << 14
# Candidates are held in memory up to this fraction of the scores; ties may make them many.
_HELD_FRACTION = 1 / 8


_FAULTS = {
    "not finite": "hold NaN or infinity; the weights or their gradients have diverged",
    "negative": "are negative, or -0.0; take their absolute values",
}


def _alone(counts: Tensor) -> Tensor:
    return counts


@dataclass(frozen=True)
class Shards:
    """How the scores are split over ranks: shard ``rank`` of ``count``, in the order of the global index.

    :param add: the sum over all shards of an int64 or float64 tensor, a new one where that is; every shard calls it
        equally often, with tensors of the same shape
    :param scores: how many there are in all, tensors and shards; 0 if that does not matter. Fewer scores are counted
        in fewer bins, so that counts are a fraction of what they count
    """

    rank: int = 0
    count: int = 1
    add: Callable[[Tensor], Tensor] = _alone
    scores: int = 0


WHOLE = Shards()


@dataclass(frozen=True)
class Threshold:
    """A score, and how the scores of each tensor lie to it.

    :param bits: of the score
    :param above: how many scores are above it: (tensors,), int64
    :param ties: how many equal it, the same
    :param scans: for each tensor, the pass that found it; None if that did not, and histograms of all scores had to
    """

    bits: int
    above: Tensor
    ties: Tensor
    scans: list[Scan] | None


@dataclass(frozen=True)
class _Target:
    """``keep`` entries in all, of each tensor ``smallest`` to ``largest`` ((tensors,), int64).

    :param weight: how many scores one counted entry stands for
    """

    keep: int
    smallest: Tensor
    largest: Tensor
    weight: int = 1

    def reached(self, counts: Tensor) -> Tensor:
        """Whether keeping these ``counts`` of entries, (tensors, ...), clipped for each tensor, keeps ``keep``."""
        bounds = [bound.view(-1, *[1] * (counts.ndim - 1)) for bound in (self.smallest, self.largest)]
        return (counts * self.weight).clamp(*bounds).sum(dim=0) >= self.keep


@dataclass(frozen=True)
class _Interval:
    """``low`` to ``high``, both included, and how many scores are above and inside it: (tensors,), int64."""

    low: int
    high: int
    above: Tensor
    inside: Tensor


def bin_bits(tensors: int, shards: Shards, device: torch.device) -> int:
    """How many bits of the scores of so many tensors one round of counting tells apart."""
    most, together = (_FUSED_BIN_BITS, _ALL_FUSED_BIN_BITS) if is_fused(device) else (_BIN_BITS[-1], _ALL_BIN_BITS)
    bits = min(max(together - tensors.bit_length(), _BIN_BITS[0]), most)
    if shards.scores:
        bits = min(bits, max(_FEWEST_BIN_BITS, (shards.scores // (_SCORES_PER_BIN * tensors)).bit_length() - 1))
    return bits


def fault_message(fault: str) -> str:
    """What is said of scores with a fault that :func:`~elsa_modifier.admm.bitscan.fault_of` names."""
    return _FAULTS[fault]


def largest_mask(scores: Tensor, keep: int) -> Tensor:
    """Boolean mask of the ``keep`` largest scores, exactly as many, ties to the lower index.

    :param scores: fp32, any shape, in main memory, without a sign (``-0.0`` has one)
    :raises ValueError: for scores that are negative or not finite, or a ``keep`` outside [0, n]
    """
    bits = score_bits(scores)
    count = bits.numel()
    if not 0 <= keep <= count:
        raise ValueError(f"cannot keep {keep} of {count} weights; allowed is 0 to {count}")
    if 0 < count < _PARTITIONED_BELOW:
        return _mask_by_partition(bits, keep).view_as(scores)
    mask = torch.empty_like(bits, dtype=torch.bool)
    found = find_threshold([lambda: bits], [count], keep, [0], [count], mask=mask)
    ties = int(found.ties)
    kept = min(max(keep - int(found.above), 0), ties)
    candidates = found.scans[0].candidates if found.scans else None
    if candidates is None:
        mask = mask_from(bits, found.bits, ties - kept)
    else:
        positions, among = candidates
        mask[positions[among < found.bits]] = False
        mask[positions[among == found.bits][kept:]] = False
    return mask.view_as(scores)


def _mask_by_partition(bits: Tensor, keep: int) -> Tensor:
    entries = bits.numpy()
    _refuse_faults([fault_of(bits)])
    rank = len(entries) - max(keep, 1)
    threshold = int(np.partition(entries, rank)[rank])
    return mask_from(bits, threshold, int(np.count_nonzero(entries >= threshold)) - keep)


def find_threshold(
    sources: Sequence[Callable[[], Tensor]],
    sizes: Sequence[int],
    keep: int,
    smallest: Sequence[int],
    largest: Sequence[int],
    mask: Tensor | None = None,
) -> Threshold:
    """The highest threshold that leaves ``keep`` entries when each tensor's scores from it up are kept, clipped.

    :param sources: for each tensor, what gives :func:`~elsa_modifier.admm.bitscan.score_bits` of its scores;
        called for one tensor at a time, twice unless the scores are unusual
    :param sizes: how many scores each source gives
    :param keep: in all; no more than the sum of ``largest``
    :param smallest: the fewest entries that each tensor keeps
    :param largest: the most
    :param mask: bool, of the size of the only source: set to which scores are above the threshold, but for the
        candidates of the scan that the result holds
    :raises ValueError: for scores that are negative or not finite
    """
    target = _Target(keep, torch.tensor(smallest), torch.tensor(largest))
    count = sum(sizes)
    low, high = (0, HIGHEST)
    if count >= _SAMPLED_FROM:
        low, high = _sampled_bracket(sources, count, target)
    scans = [scan(source(), low, high, int(_HELD_FRACTION * n), mask) for source, n in zip(sources, sizes, strict=True)]
    _refuse_faults([s.fault for s in scans])
    above, inside = (torch.tensor(counts) for counts in ([s.above for s in scans], [s.inside for s in scans]))
    interval = _Interval(low, high, above, inside)
    missed = not target.reached(above + inside) or (high < HIGHEST and bool(target.reached(above)))
    if missed:
        interval = _everything(len(sources), torch.tensor(sizes))
    else:
        held = [s.candidates for s in scans]
        sources = [_constant(c[1]) if c is not None else source for c, source in zip(held, sources, strict=True)]
    exact = _refine(sources, interval, target)
    return Threshold(exact.low, exact.above, exact.inside, None if missed else scans)


def _sampled_bracket(sources: Sequence[Callable[[], Tensor]], count: int, target: _Target) -> tuple[int, int]:
    """An interval of bits that most likely holds the threshold, from a sample of the scores."""
    # A sample of m scores leaves candidates in proportion to n / sqrt(m): with m in proportion to n^(2/3), both cost as
    # much at any n. An odd stride does not stay in a few columns of a matrix.
    stride = round(0.5 * count ** (1 / 3)) | 1
    samples = [_constant(source()[stride // 2 :: stride].contiguous()) for source in sources]
    kept = target.keep / count
    # The sample of each tensor is a whole number of entries: up to half an entry off.
    deviation = math.sqrt(kept * (1 - kept) * count / stride + len(sources))
    margin = math.ceil((_DEVIATIONS * deviation + 1) * stride)
    start = _everything(len(sources), torch.zeros(len(sources), dtype=torch.int64))
    low, high = (
        _refine(samples, start, _Target(target.keep + m, target.smallest, target.largest, stride)).low
        for m in (margin, -margin)
    )
    return low, high


def _refine(sources: Sequence[Callable[[], Tensor]], interval: _Interval, target: _Target) -> _Interval:
    """Narrow an interval that holds the threshold down to it, by histograms."""
    step = bin_bits(len(sources), WHOLE, torch.device("cpu"))
    while interval.low < interval.high:
        low, high = interval.low, interval.high
        shift = max(0, (high - low).bit_length() - step)
        counts = torch.stack([histogram(source(), low, high, shift) for source in sources])
        # How many scores are in a bin or above it.
        reach = counts.flip(1).cumsum(1).flip(1) + interval.above.unsqueeze(1)
        bin_ = max(int(target.reached(reach).sum()) - 1, 0)
        inside = counts[:, bin_]
        low += bin_ << shift
        interval = _Interval(low, min(high, low + (1 << shift) - 1), reach[:, bin_] - inside, inside)
    return interval


def _everything(tensors: int, inside: Tensor) -> _Interval:
    return _Interval(0, HIGHEST, torch.zeros(tensors, dtype=torch.int64), inside)


def _constant(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _refuse_faults(faults: Sequence[str]) -> None:
    for kind, message in _FAULTS.items():
        if kind in faults:
            raise ValueError(f"the scores to project {message}")
