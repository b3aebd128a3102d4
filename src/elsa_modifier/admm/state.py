"""The split variable ``z`` and the dual ``u`` of one weight, in at most one dense tensor and one bit a weight.

With ``v = x + u`` and the mask ``M`` that the projection selects, ``z = v M`` and the new dual is
``u = v - z = v (1 - M)``: their supports are disjoint, so one tensor holds both. (Its form ``z - u`` is the reflection
``(2 Proj - I) v`` of Douglas-Rachford splitting.) That is 4.125 bytes a weight in fp32 where two tensors take 8, and
1.14 in the 8-bit formats. Where ``z`` follows ``x`` only the dual is left to store, and without a dual only the bits.

What is stored off the support is ``-y``, the negative of the unscaled dual ``y = penalty * u``. A schedule that changes
the penalty must leave ``y`` as it is and rescale ``u``; so nothing has to be done, and the proximal term is
``penalty (x - z) + y``.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from elsa_modifier.admm.bitmask import count_entered, pack_bits, select_by_bits, unpack_bits
from elsa_modifier.admm.penalty import PenaltyForm
from elsa_modifier.admm.placement import compiled, is_fused
from elsa_modifier.admm.projection import MaskStructure, projection_scores, sparse_mask
from elsa_modifier.admm.rounding import Key, hashed_int16, rounded_stochastically, uniform_int16
from elsa_modifier.admm.storage import (
    BLOCK,
    Scratch,
    StateDtype,
    Stored,
    StoredPair,
    chunks,
    in_blocks,
    read_stored,
    write_stored,
)

__all__ = ["ADMMState", "Part", "Pull", "negated_inverse", "point", "pull_", "pull_weight_"]


class Part(NamedTuple):
    """What a state holds of one of a weight's :func:`~elsa_modifier.admm.storage.chunks`: views.

    :param bits: of the mask, packed
    :param stored: the pair, if there is one
    """

    bits: Tensor
    stored: Stored | None


class Pull(NamedTuple):
    """What the x-update adds to the base optimizer's step, of one part of a weight; see :func:`pull_`.

    :param factor: what is left of a pruned entry, ``1 - penalty``: 0 once the mask is fixed
    :param scratch: in main memory
    """

    part: Part
    factor: float | Tensor
    scratch: Scratch | None = None


class ADMMState:
    """``z`` and scaled ``u`` of one weight ``x``, which is fp32 or bf16.

    :param x: the weight, contiguous; the state takes its shape and device
    :param keep: how many entries stay; may be changed between updates
    :param structure: the zero pattern
    :param form: ``coupled`` holds ``z`` from one update to the next. ``decoupled`` lets it follow ``x`` on its support
        (partial minimization over ``z`` for a fixed support, where ``u`` is 0), so that only pruned weights feel the
        penalty
    :param dual: whether there is one, which the coupled form always has; otherwise ``u`` is 0
    :param dtype: what the pair is stored in; arithmetic is fp32
    :param first: the packed mask to start from; None is that of the largest magnitudes

    In the methods, ``scratch`` is for weights of at least this size, and None allocates.
    """

    def __init__(
        self,
        x: Tensor,
        keep: int,
        structure: MaskStructure,
        *,
        form: PenaltyForm = "decoupled",
        dual: bool = True,
        dtype: StateDtype = "fp32",
        first: Tensor | None = None,
    ) -> None:
        self.keep = keep
        self.structure = structure
        self.form = form
        self._shape = x.shape
        if first is None:
            first = pack_bits(self._select(projection_scores(x.detach().float()), None))
        self._bits = first
        # z on the support, -y off it. At first z = Proj(x) and y = 0.
        self._pair: StoredPair | None = None
        if form == "coupled":
            self._pair = StoredPair(x.numel(), dtype, x.device, both_kinds=True)
            self.write_pair_(x.detach() * self.mask)
        elif dual:
            self._pair = StoredPair(x.numel(), dtype, x.device, both_kinds=False)

    @property
    def mask(self) -> Tensor:
        """Kept entries, bool, the shape of the weight."""
        return unpack_bits(self._bits, self._shape)

    @property
    def bits(self) -> Tensor:
        """The mask, packed by :func:`~elsa_modifier.admm.bitmask.pack_bits`."""
        return self._bits

    @property
    def nbytes(self) -> int:
        """Bytes this state holds."""
        return self._bits.nbytes + (0 if self._pair is None else self._pair.nbytes)

    @property
    def pair(self) -> StoredPair | None:
        """What ``z`` and ``u`` are stored in, if they are."""
        return self._pair

    @property
    def pair_parts(self) -> dict[str, tuple[Tensor, int]]:
        """What the pair is stored in, as :attr:`~elsa_modifier.admm.storage.StoredPair.parts`; empty without one."""
        return {} if self._pair is None else self._pair.parts

    def pair_values(self) -> Tensor:
        """``z`` on the support and ``-y`` off it, as far as they are stored, fp32, the shape of the weight."""
        return self._stored()

    def write_pair_(self, values: Tensor) -> None:
        """Store values as :meth:`pair_values` gives them, for the mask as it is now."""
        for start, end, part in self._parts():
            assert part.stored is not None
            write_stored(part.stored, in_blocks(_flat(values)[start:end]).float().clone(), part.bits, None)

    def split(self, x: Tensor) -> Tensor:
        """``z``, fp32, of which ``x`` is the weight."""
        return (self._stored() if self.form == "coupled" else x.detach().float()) * self.mask

    def dual(self, penalty: float) -> Tensor:
        """``u = y / penalty``, fp32, zero on the support and at a penalty of 0 (which has built up no dual)."""
        return self._stored() * select_by_bits(self._bits, self._shape, 0.0, negated_inverse(penalty))

    @torch.no_grad()
    def scores(self, x: Tensor, penalty: float, fisher: Tensor | None = None, scratch: Scratch | None = None) -> Tensor:
        """What :meth:`update` with the same arguments will rank: the scores of ``v = x + u``, fp32, a new tensor."""
        return projection_scores(self._point(x, penalty, self._scratch(scratch)), fisher)

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        penalty: float,
        fisher: Tensor | None = None,
        scratch: Scratch | None = None,
        *,
        ascent: float = 1.0,
        select: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """z- and u-update. Returns how many entries entered the mask.

        :param x: the weight
        :param penalty: its value from now on; at 0 the dual stays zero
        :param fisher: diagonal Fisher of ``x`` for the objective-aware projection; None projects by magnitude
        :param ascent: the part of the residual that the dual takes up, 0 to 1
        :param select: from scores to the mask, where ``keep`` and ``structure`` do not tell: a part of a weight
        :returns: zero-dimensional int64 tensor on the weight's device
        :raises ValueError: if ``x`` or ``fisher`` is not finite
        """
        scratch = self._scratch(scratch)
        # z <- Proj(x + u)
        v = self._point(x, penalty, scratch)
        new = pack_bits(self._select(projection_scores(v, fisher), select))
        entered = count_entered(new, self._bits)
        self._bits = new
        # u <- u + ascent (x - z)
        if self._pair is not None:
            for start, end, part in self._parts():
                weight, values = (in_blocks(_flat(t)[start:end]) for t in (x, v))
                _ascend_(weight, values, part, 1.0 - ascent, -penalty, scratch, coupled=self.form == "coupled")
        return entered

    @torch.no_grad()
    def move_to(self, bits: Tensor, x: Tensor, penalty: float, *, ascent: float = 1.0) -> Tensor:
        """The same as :meth:`update` for a mask that has been chosen already, on an accelerator."""
        entered = _entered(bits, self._bits)
        if self._pair is not None:
            for start, end, part in self._parts():
                weight, new = in_blocks(_flat(x)[start:end]), bits[start // 8 : -(-end // 8)]
                factors = negated_inverse(penalty), 1.0 - ascent, -penalty
                _ascend_whole_(weight, part, new, *factors, coupled=self.form == "coupled")
        self._bits = bits
        return entered

    @torch.no_grad()
    def add_proximal_gradient_(self, grad: Tensor, x: Tensor, penalty: float, scratch: Scratch | None = None) -> None:
        """Coupled proximal term, in place: ``grad <- grad + penalty (x - z) + y``."""
        assert self.form == "coupled" and self._pair is not None
        for start, end, part in self._parts():
            gradient, weight = (in_blocks(_flat(t)[start:end]) for t in (grad, x))
            _add_proximal_gradient_(gradient, weight, part, penalty, -penalty, scratch=scratch)

    def pull(self, start: int, end: int, penalty: float, scratch: Scratch | None = None, block: int = BLOCK) -> Pull:
        """The decoupled proximal step of a part of the weight: ``x <- x - penalty (x - z) - y``, penalty 0 to 1."""
        assert self.form == "decoupled"
        return Pull(self.part(start, end, block), 1.0 - penalty, scratch)

    def mask_out(self, start: int, end: int, scratch: Scratch | None = None) -> Pull:
        """Zeroes what is outside the mask (as ``+0.0`` or ``-0.0``), of a part of the weight or of its gradient."""
        return Pull(Part(self._bits_of(start, end), None), 0.0, scratch)

    @torch.no_grad()
    def residual_sums(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        """``||x - z||^2`` and ``||x||^2``, fp32, shape (2,): the primal residual is the root of their ratio."""
        sums = torch.zeros(2, device=x.device)
        for start, end, part in self._parts():
            weight = in_blocks(_flat(x)[start:end])
            found = _residual_sums(weight, part, coupled=self.form == "coupled", scratch=scratch)
            sums += found if found.ndim == 1 else found.sum(dim=1)
        return sums

    def _select(self, scores: Tensor, select: Callable[[Tensor], Tensor] | None) -> Tensor:
        return sparse_mask(scores, self.keep, self.structure) if select is None else select(scores)

    def _point(self, x: Tensor, penalty: float, scratch: Scratch) -> Tensor:
        """``v = x + u``, fp32, in ``scratch``."""
        v = scratch.whole[: x.numel()]
        if self._pair is None:
            return v.copy_(_flat(x)).view(self._shape)
        for start, end, part in self._parts():
            point(in_blocks(_flat(x)[start:end]), part, negated_inverse(penalty), in_blocks(v[start:end]), scratch)
        return v.view(self._shape)

    def _parts(self) -> Iterator[tuple[int, int, Part]]:
        """Start, end and state of each part that is worked on at once."""
        for start, end in chunks(self._shape.numel(), self._bits.device):
            yield start, end, self.part(start, end)

    def part(self, start: int, end: int, block: int = BLOCK) -> Part:
        """What is held of one of the weight's :func:`~elsa_modifier.admm.storage.chunks`.

        :param block: entries of a block of what else is computed with
        """
        return Part(self._bits_of(start, end), None if self._pair is None else self._pair.part(start, end, block))

    def _bits_of(self, start: int, end: int) -> Tensor:
        return self._bits[start // 8 : -(-end // 8)]

    def _stored(self) -> Tensor:
        if self._pair is None or not self._shape.numel():
            return torch.zeros(self._shape, device=self._bits.device)
        parts = [part for _, _, part in self._parts()]
        found = [read_stored(p.stored, p.bits, None).flatten() for p in parts if p.stored is not None]
        return torch.cat(found).view(self._shape)

    def _scratch(self, scratch: Scratch | None) -> Scratch:
        return Scratch(self._shape.numel(), self._bits.device) if scratch is None else scratch


def pull_(values: Tensor, pull: Pull) -> None:
    """Decoupled proximal step or mask, in place, on values (rows, blocks, entries), fp32 unless it is a mask."""
    part, factor, scratch = pull
    # x - z and y are zero on the support.
    values.mul_(select_by_bits(part.bits, values.shape, 1.0, factor, _selection(scratch)))
    if part.stored is not None:
        values.add_(read_stored(part.stored, part.bits, scratch))


@compiled
def _add_proximal_gradient_(
    gradient: Tensor, x: Tensor, part: Part, penalty: float, minus_penalty: float, *, scratch: Scratch | None
) -> None:
    assert part.stored is not None
    stored = read_stored(part.stored, part.bits, scratch)
    pull = x.float() * penalty
    gradient.add_(pull)
    minus = select_by_bits(part.bits, stored.shape, minus_penalty, -1.0, _selection(scratch))
    gradient.add_(torch.mul(stored, minus, out=pull) if scratch is not None else stored * minus)


@compiled
def _residual_sums(x: Tensor, part: Part, *, coupled: bool, scratch: Scratch | None) -> Tensor:
    """(2,), or (2, rows)."""
    weight = x.float()
    selection = _selection(scratch)
    if is_fused(x.device) and not coupled:
        # Sums of rows that read the same: one kernel for both.
        outside, inside = (
            (weight * select_by_bits(part.bits, weight.shape, on, 1.0 - on)).square().sum(dim=2).view(-1)
            for on in (0.0, 1.0)
        )
        return torch.stack([outside, outside + inside])
    if coupled and part.stored is not None:
        stored = read_stored(part.stored, part.bits, scratch)
        gap = weight - stored * select_by_bits(part.bits, weight.shape, 1.0, 0.0, selection)
    else:
        gap = weight * select_by_bits(part.bits, weight.shape, 0.0, 1.0, selection)
    if is_fused(x.device):
        return torch.stack([gap.square().sum(dim=2).view(-1), weight.square().sum(dim=2).view(-1)])
    return torch.stack([torch.dot(values.view(-1), values.view(-1)) for values in (gap, weight)])


def point(
    x: Tensor,
    part: Part,
    inverse: float | Tensor,
    out: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """``v = x + u``, fp32, which where nothing is stored may be ``x`` itself.

    :param inverse: ``-1 / penalty``; 0 at a penalty of 0
    """
    if part.stored is None:
        return x.float()
    stored = read_stored(part.stored, part.bits, scratch)
    dual = select_by_bits(part.bits, stored.shape, 0.0, inverse, _selection(scratch))
    return torch.mul(stored, dual, out=out).add_(x)


def _ascend_(
    x: Tensor,
    v: Tensor,
    part: Part,
    less: float | Tensor,
    off: float | Tensor,
    scratch: Scratch | None,
    *,
    coupled: bool,
) -> None:
    """The u-update: store ``z`` and ``-y`` for a new mask. Overwrites ``v``."""
    assert part.stored is not None
    if isinstance(less, Tensor) or less > 0:
        v.sub_(x.float() * less) if isinstance(less, Tensor) else v.sub_(x, alpha=less)
    v.mul_(select_by_bits(part.bits, v.shape, 1.0 if coupled else 0.0, off, _selection(scratch)))
    write_stored(part.stored, v, part.bits, scratch)


@compiled
def _ascend_whole_(
    x: Tensor, part: Part, new: Tensor, inverse: float, less: float, off: float, *, coupled: bool
) -> None:
    assert part.stored is not None
    v = point(x, part, inverse)
    _ascend_(x, v, Part(new, part.stored), less, off, None, coupled=coupled)


@compiled
def _entered(new: Tensor, old: Tensor) -> Tensor:
    return count_entered(new, old)


def _selection(scratch: Scratch | None) -> Tensor | None:
    return None if scratch is None else scratch.selection


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


def negated_inverse(penalty: float) -> float:
    """``-1 / penalty``, by which what is stored off the support is the dual; 0 at a penalty of 0."""
    return -1.0 / penalty if penalty > 0 else 0.0


@compiled
def pull_weight_(weight: Tensor, pull: Pull, noise: Key | None, ok: Tensor | None, *, is_mask: bool) -> None:
    """:func:`pull_` on a part of a weight, fp32 or bf16, which is rounded stochastically.

    :param noise: on an accelerator
    :param ok: zero-dimensional bool: where it is False all stays as it is
    :param is_mask: whether nothing has to be rounded
    """
    if ok is None and (is_mask or weight.dtype == torch.float32):
        pull_(weight, pull)
        return
    buffer = None if pull.scratch is None else pull.scratch.weight[: weight.numel()].view(weight.shape)
    values = weight.to(torch.float32, copy=True) if buffer is None else buffer.copy_(weight)
    pull_(values, pull)
    if weight.dtype != torch.float32:
        drawn = uniform_int16(values) if noise is None else hashed_int16(noise, values.shape, values.device)[0]
        values = rounded_stochastically(values, drawn)
    weight.copy_(values if ok is None else torch.where(ok, values, weight.float()))
