"""Scores of a weight on an accelerator, computed anew in every pass over them rather than written to memory.

What a pass finds out stays on the device: counts of scores by digit, ties, masks. Each is one kernel or two, which read
weights and second moments and write next to nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from elsa_modifier.admm.bitmask import pack_bits
from elsa_modifier.admm.moments import MomentPart, read_second
from elsa_modifier.admm.placement import compiled
from elsa_modifier.admm.projection import MaskStructure, largest_of_each_group, projection_scores
from elsa_modifier.admm.state import Part, point

__all__ = ["Scored", "count_digits", "count_faults", "mask_bits", "materialized", "pattern_bits", "scores_of"]

# Entries whose ties are numbered at once.
_TIE_BLOCK = 1024
_INFINITY = 0x7F800000
# The bits of minus infinity, read as a signed integer: negative NaNs come above it.
_MINUS_INFINITY = 0xFF800000 - (1 << 32)


class Scored(NamedTuple):
    """What the scores of a weight, or of one of its parts, are computed from.

    :param x: the weight, (rows, blocks in a row, entries of a block)
    :param part: the state, None where ``v`` is ``x``
    :param inverse: see :func:`~elsa_modifier.admm.state.negated_inverse`
    :param fisher: fp32 in the shape of ``x``, or quantized; None ranks by magnitude
    :param correction: what the scores are multiplied by, zero-dimensional
    """

    x: Tensor
    part: Part | None = None
    inverse: float | Tensor = 0.0
    fisher: Tensor | MomentPart | None = None
    correction: float | Tensor | None = None


def scores_of(scored: Scored) -> Tensor:
    """The scores, fp32, a new tensor."""
    x, part, inverse, fisher, correction = scored
    v = x.float() if part is None else point(x, part, inverse)
    if isinstance(fisher, MomentPart):
        fisher = read_second(fisher)
    elif fisher is not None:
        fisher = fisher.float()
    found = projection_scores(v, fisher if fisher is None else fisher.clone())
    return found if correction is None else found * correction


@compiled
def materialized(x: Tensor, scored: Scored) -> Tensor:
    """:func:`scores_of`, flat: for weights that are not whole blocks."""
    return scores_of(scored).flatten()


@compiled
def count_digits(x: Tensor, scored: Scored, low: Tensor, *, shift: int, bins: int, structure: MaskStructure) -> Tensor:
    """Count scores from ``low`` on by the digit that their bits have from ``shift`` on: (bins + 2,), int32.

    The last two counts are of scores that are not finite, and of negative ones.

    :param low: zero-dimensional int64: the bits of the lowest score of digit 0
    :param bins: a power of two
    :param structure: the largest that an N:M structure leaves count as the highest scores there are
    """
    bits = _score_bits(scored, structure)
    digit = (bits.to(torch.int64) - low) >> shift
    inside = (digit >= 0) & (digit < bins) & (bits >= 0)
    not_finite, negative = _faults(bits)
    fault = torch.where(negative, bins + 1, bins)
    # What is neither counted nor a fault adds 0, in many places: additions in one wait for each other.
    place = torch.where(not_finite | negative, fault, digit & (bins - 1))
    counts = torch.zeros(bins + 2, dtype=torch.int32, device=x.device)
    return counts.scatter_add_(0, place, (inside | not_finite | negative).to(torch.int32))


@compiled
def count_faults(x: Tensor, scored: Scored) -> Tensor:
    """How many scores are not finite, and negative: (2,), int64."""
    return torch.stack([fault.sum() for fault in _faults(_score_bits(scored, MaskStructure()))])


@compiled
def _count_ties(x: Tensor, scored: Scored, threshold: Tensor, *, structure: MaskStructure) -> Tensor:
    return _in_tie_blocks(_score_bits(scored, structure) == threshold).sum(dim=1, dtype=torch.int32)


@compiled
def _mask(
    x: Tensor, scored: Scored, threshold: Tensor, kept: Tensor, before: Tensor, *, structure: MaskStructure
) -> Tensor:
    bits = _score_bits(scored, structure)
    ties = bits == threshold
    numbers = _in_tie_blocks(ties).cumsum(dim=1, dtype=torch.int32) + before.unsqueeze(1)
    numbers = numbers.view(-1)
    if numbers.numel() != bits.numel():
        numbers = numbers[: bits.numel()]
    return (bits > threshold) | (ties & (numbers <= kept))


@compiled
def _pack(mask: Tensor) -> Tensor:
    return pack_bits(mask)


def mask_bits(scored: Scored, threshold: Tensor, kept: Tensor, structure: MaskStructure) -> Tensor:
    """The packed mask of the scores above a threshold, and of the first that equal it.

    :param threshold: its bits, zero-dimensional int64
    :param kept: how many that equal it, zero-dimensional int64
    """
    ties = _count_ties(scored.x, scored, threshold, structure=structure)
    before = ties.cumsum(0, dtype=torch.int32) - ties
    # A kernel for each: in one, the second would compute what is in the first, scores and all, anew.
    return _pack(_mask(scored.x, scored, threshold, kept, before, structure=structure))


@compiled
def _pattern_bits(x: Tensor, scored: Scored, *, structure: MaskStructure) -> Tensor:
    return pack_bits(largest_of_each_group(scores_of(scored).view(-1, structure.group), structure))


def pattern_bits(scored: Scored, structure: MaskStructure) -> Tensor:
    """The packed mask of what an N:M structure leaves."""
    return _pattern_bits(scored.x, scored, structure=structure)


def _score_bits(scored: Scored, structure: MaskStructure) -> Tensor:
    scores = scores_of(scored).view(-1)
    if not structure.is_unstructured:
        kept = largest_of_each_group(scores.view(-1, structure.group), structure).view(-1)
        largest = torch.finfo(torch.float32).max
        scores = torch.where(kept & (scores <= largest), largest, scores)
    return scores.view(torch.int32)


def _faults(bits: Tensor) -> tuple[Tensor, Tensor]:
    return (bits >= _INFINITY) | ((bits < 0) & (bits >= _MINUS_INFINITY)), bits < _MINUS_INFINITY


def _in_tie_blocks(ties: Tensor) -> Tensor:
    if ties.numel() % _TIE_BLOCK:
        ties = torch.nn.functional.pad(ties, (0, -ties.numel() % _TIE_BLOCK))
    return ties.view(-1, _TIE_BLOCK)
