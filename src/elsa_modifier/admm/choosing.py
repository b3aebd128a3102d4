"""How the masks of all weights are chosen, wherever weights lie: in main memory, on an accelerator, over ranks."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from elsa_modifier.admm.bitmask import pack_bits
from elsa_modifier.admm.constraint import Constraint
from elsa_modifier.admm.placement import is_fused
from elsa_modifier.admm.projection import MaskStructure, scores_beyond_pattern, sparse_mask
from elsa_modifier.admm.scores import Scored, count_digits, count_faults, mask_bits, materialized, pattern_bits
from elsa_modifier.admm.selection import Shards
from elsa_modifier.admm.storage import BLOCK, chunks, in_blocks
from elsa_modifier.admm.thresholds import Cut, Demand, count_scores, find_cuts

__all__ = ["Choice", "Source", "choose", "choose_by_magnitude"]


@dataclass(frozen=True)
class Source:
    """Where the scores of a weight, or of this rank's rows of one, come from; asked for several times.

    :param scores: in main memory: gives them, fp32, a new tensor
    :param parts: on an accelerator: gives what they are computed from
    :param correction: what the scores are multiplied by, to be compared with those of other weights; None is 1
    :param here: on an accelerator: within its context what they are computed from is there
    """

    scores: Callable[[], Tensor]
    parts: Callable[[], Sequence[Scored]]
    structure: MaskStructure
    correction: float | Tensor | None = None
    here: Callable[[], AbstractContextManager[None]] = nullcontext

    def count_on_host(self, low: Tensor, width: int, shift: int) -> Tensor:
        """A :data:`~elsa_modifier.admm.thresholds.Counter`."""
        return count_scores(self.ranked(self.scores()), int(low), width, shift)

    def count_on_device(self, low: Tensor, width: int, shift: int) -> Tensor:
        """The same."""
        bins = 1 << (width - shift)
        with self.here():
            whole = self.whole()
            if whole is None:
                return torch.zeros(bins + 2, dtype=torch.int32, device=low.device)
            return count_digits(whole.x, whole, low, shift=shift, bins=bins, structure=self.structure)

    def ranked(self, scores: Tensor) -> Tensor:
        """By which entries are ranked: corrected, in place, and the highest where a structure has chosen."""
        scores = self.corrected(scores)
        return scores if self.structure.is_unstructured else scores_beyond_pattern(scores, self.structure)

    def corrected(self, scores: Tensor) -> Tensor:
        """Scores times the correction, in place."""
        return scores if self.correction is None else scores.mul_(self.correction)

    def whole(self) -> Scored | None:
        """All of it in one piece; None if there is nothing."""
        parts = self.parts()
        if not parts:
            return None
        cuts_groups = not self.structure.is_unstructured and BLOCK % self.structure.group != 0
        if len(parts) == 1 and not cuts_groups:
            return parts[0]
        # Few weights are not whole blocks: their scores are written to memory.
        return Scored(torch.cat([materialized(part.x, part) for part in parts]).view(1, 1, -1))


@dataclass(frozen=True)
class Choice:
    """How the mask of a weight is chosen.

    :param cut: None where all is here and ``keep`` says it, or a structure decides row by row
    :param keep: how many entries
    """

    source: Source
    cut: Cut | None
    keep: int

    def mask(self, scores: Tensor) -> Tensor:
        """From the scores, in main memory, which may be overwritten: kept entries, bool, the same shape.

        :raises ValueError: for scores that are negative or not finite
        """
        if self.cut is None:
            return sparse_mask(self.source.corrected(scores), self.keep, self.source.structure)
        return self.cut(self.source.ranked(scores))

    def bits(self) -> Tensor:
        """On an accelerator: the packed mask. Within the context of the source's ``here``."""
        whole = self.source.whole()
        if whole is None:
            return torch.zeros(0, dtype=torch.uint8)
        if self.cut is None:
            return pattern_bits(whole, self.source.structure)
        return mask_bits(whole, self.cut.bits, self.cut.kept, self.source.structure)


def choose(
    constraint: Constraint, demand: Demand, sources: Sequence[Source], shards: Shards, device: torch.device
) -> tuple[list[Choice], list[int]]:
    """The choice of each mask, and how many entries each whole weight keeps. On an accelerator the host reads once.

    :raises ValueError: on every shard, for scores that are negative or not finite
    """
    fused = is_fused(device)
    if shards.count == 1 and not fused:
        keeps = constraint.keeps(demand, lambda i: sources[i].corrected(sources[i].scores()))
        return [Choice(source, None, keep) for source, keep in zip(sources, keeps, strict=True)], keeps
    weights = constraint.weights
    # As long as an N:M structure keeps what its pattern leaves, each row decides for itself.
    apart = [
        i
        for i, (w, most) in enumerate(zip(weights, demand.most, strict=True))
        if not w.structure.is_unstructured and most <= w.left_by_pattern
    ]
    cut = [i for i in range(len(weights)) if i not in set(apart)]
    found, kept = find_cuts(
        [sources[i].count_on_device if fused else sources[i].count_on_host for i in cut],
        Demand([demand.fewest[i] for i in cut], [demand.most[i] for i in cut], demand.total),
        shards,
        device,
        names=[weights[i].name for i in [*cut, *apart]],
        faults=torch.stack([_faults(sources[i], device) for i in apart]) if fused and apart else None,
    )
    choices = [Choice(source, None, 0) for source in sources]
    keeps = list(demand.fewest)
    for i, own, keep in zip(cut, found, kept, strict=True):
        choices[i], keeps[i] = Choice(sources[i], own, keep), keep
    return choices, keeps


def choose_by_magnitude(constraint: Constraint, shards: Shards) -> list[tuple[Tensor, int]]:
    """The packed mask of each weight's largest magnitudes before the first step, and how many entries it keeps."""

    def parts(number: int) -> list[Scored]:
        weight = constraint.weights[number].weight.detach().view(-1)
        return [Scored(in_blocks(weight[start:end])) for start, end in chunks(weight.numel(), weight.device)]

    device = constraint.weights[0].weight.device
    sources = [
        Source(partial(constraint.magnitudes, i), partial(parts, i), pruned.structure)
        for i, pruned in enumerate(constraint.weights)
    ]
    choices, keeps = choose(constraint, constraint.demand(0, range(len(sources))), sources, shards, device)
    masks = [c.bits() if is_fused(device) else pack_bits(c.mask(c.source.scores())) for c in choices]
    return list(zip(masks, keeps, strict=True))


def _faults(source: Source, device: torch.device) -> Tensor:
    with source.here():
        whole = source.whole()
        return torch.zeros(2, dtype=torch.int64, device=device) if whole is None else count_faults(whole.x, whole)
