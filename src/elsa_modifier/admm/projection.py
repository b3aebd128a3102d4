"""Euclidean and Fisher-weighted projection onto the sparse set (arXiv 2510.01650, section 3.2).

A projection keeps the ``keep`` entries with the largest score and zeroes the rest. Everything here returns the mask of
kept entries; the projected point is ``v * mask``. Selection is exact: ties never change the number of kept entries,
and are broken towards the lower index, so that every device and every run picks the same weights.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from elsa_modifier.admm.selection import fault_message, largest_mask

__all__ = [
    "MaskStructure",
    "largest_of_each_group",
    "parse_mask_structure",
    "projection_scores",
    "scores_beyond_pattern",
    "sparse_mask",
]


@dataclass(frozen=True)
class MaskStructure:
    """Shape of the zero pattern: ``zeroed`` of every ``group`` entries along the input dimension, or free.

    ``group == 0`` means unstructured: the number of zeros is fixed per tensor only.
    """

    zeroed: int = 0
    group: int = 0

    @property
    def is_unstructured(self) -> bool:
        return self.group == 0

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros that the pattern implies; None for unstructured."""
        return None if self.is_unstructured else self.zeroed / self.group

    def left_of(self, entries: int) -> int:
        """How many of so many entries, whole groups, an N:M pattern leaves."""
        return entries // self.group * (self.group - self.zeroed)

    def __str__(self) -> str:
        return "unstructured" if self.is_unstructured else f"{self.zeroed}:{self.group}"


def parse_mask_structure(text: str) -> MaskStructure:
    """Parse ``"unstructured"`` or ``"N:M"`` (N zeroed of every M, ``0 < N < M``).

    :raises ValueError: for anything else.
    """
    if text == "unstructured":
        return MaskStructure()
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match and 0 < int(match[1]) < int(match[2]):
        return MaskStructure(zeroed=int(match[1]), group=int(match[2]))
    raise ValueError(
        f"mask_structure is {text!r}; allowed are 'unstructured' and 'N:M' with 0 < N < M "
        "(N zeros in every M weights along the input dimension), for example '2:4'"
    )


def projection_scores(v: Tensor, fisher: Tensor | None = None) -> Tensor:
    """Saliency of each entry of ``v``: a monotone transform of ``F v^2`` (section 3.2), or ``|v|`` without a Fisher.

    ``sqrt(F) |v|`` ranks as ``F v^2`` does, without the underflow of squaring two small numbers. A Fisher of 0 counts
    as the smallest normal number: among entries of which no more is known, the larger ones stay.

    :param v: the point to project, ``x + u``; any shape, floating point
    :param fisher: diagonal of the empirical Fisher (Adam's second moment), the shape of ``v``, non-negative
    """
    # The absolute value comes last: a root of -0.0 would leave its sign.
    return v.abs() if fisher is None else fisher.clamp_min(torch.finfo(fisher.dtype).tiny).sqrt_().mul_(v).abs_()


def sparse_mask(scores: Tensor, keep: int, structure: MaskStructure | None = None) -> Tensor:
    """Boolean mask of the entries to keep: the largest scores, exactly ``keep`` of them, ties to the lower index.

    :param scores: saliencies, fp32, without a sign (as :func:`projection_scores` gives them); (out, in) for an N:M
        structure, else any shape
    :param keep: how many entries of the tensor stay. An N:M structure keeps no fewer than its pattern leaves; of those
        that it would zero, the largest scores stay, until there are ``keep``
    :param structure: the zero pattern, unstructured by default
    :raises ValueError: for a score that is negative or not finite, a ``keep`` outside [0, n], or a width that the group
        does not divide
    """
    if structure is None or structure.is_unstructured:
        return largest_mask(scores, keep)
    if keep > structure.left_of(scores.numel()):
        return largest_mask(scores_beyond_pattern(scores, structure), keep)
    return _pattern(scores, structure)


def scores_beyond_pattern(scores: Tensor, structure: MaskStructure) -> Tensor:
    """Scores by which more entries than an N:M pattern leaves are chosen: the largest there are, where it leaves one.

    :raises ValueError: as :func:`sparse_mask`
    """
    return scores.masked_fill(_pattern(scores, structure), torch.finfo(scores.dtype).max)


def _pattern(scores: Tensor, structure: MaskStructure) -> Tensor:
    # NaN wins a maximum as infinity does, so one reduction finds both.
    if scores.numel() and not torch.isfinite(scores.amax()):
        raise ValueError(f"the scores to project {fault_message('not finite')}")
    return largest_of_each_group(scores, structure)


def largest_of_each_group(scores: Tensor, structure: MaskStructure) -> Tensor:
    """Boolean mask of what an N:M structure leaves: groups lie along the last dimension.

    :raises ValueError: if the group does not divide it
    """
    size = structure.group
    if scores.shape[-1] % size:
        raise ValueError(
            f"mask structure {structure} needs an input dimension divisible by {size}, not {scores.shape[-1]}"
        )
    entries = scores.unflatten(-1, (-1, size)).unbind(-1)
    # The rank of an entry is how many of its group beat it: exact for ties, and no sort.
    ranks = [torch.zeros_like(entry, dtype=torch.uint8) for entry in entries]
    for i in range(size):
        for j in range(i + 1, size):
            first_wins = entries[i] >= entries[j]
            ranks[j] += first_wins
            ranks[i] += ~first_wins
    return torch.stack([rank < size - structure.zeroed for rank in ranks], dim=-1).flatten(-2)
