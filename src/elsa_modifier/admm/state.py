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

import torch
from torch import Tensor

from elsa_modifier.admm.bitmask import count_entered, pack_bits, select_by_bits, unpack_bits
from elsa_modifier.admm.penalty import PenaltyForm
from elsa_modifier.admm.projection import MaskStructure, projection_scores, sparse_mask
from elsa_modifier.admm.storage import Scratch, StateDtype, StoredPair, chunks

__all__ = ["ADMMState"]


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
    :param scratch: for weights of at least this size; here and in the methods, None allocates
    :param select: from scores to the mask, here and in :meth:`update`, where ``keep`` and ``structure`` do not tell: a
        part of a weight
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
        scratch: Scratch | None = None,
        select: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.keep = keep
        self.structure = structure
        self.form = form
        self._shape = x.shape
        self._bits = pack_bits(self._select(projection_scores(x.detach().float()), select))
        # z on the support, -y off it. At first z = Proj(x) and y = 0.
        self._pair: StoredPair | None = None
        if form == "coupled":
            scratch = self._scratch(scratch)
            self._pair = StoredPair(x.numel(), dtype, x.device, both_kinds=True)
            for start, end, bits in self._chunks():
                chosen = select_by_bits(bits, torch.Size([end - start]), 1.0, 0.0, scratch.selection)
                self._pair.write(start, end, _flat(x)[start:end] * chosen, bits, scratch)
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
    def pair_parts(self) -> dict[str, tuple[Tensor, int]]:
        """What the pair is stored in, as :attr:`~elsa_modifier.admm.storage.StoredPair.parts`; empty without one."""
        return {} if self._pair is None else self._pair.parts

    def pair_values(self) -> Tensor:
        """``z`` on the support and ``-y`` off it, as far as they are stored, fp32, the shape of the weight."""
        return self._stored()

    def write_pair_(self, values: Tensor) -> None:
        """Store values as :meth:`pair_values` gives them, for the mask as it is now."""
        assert self._pair is not None
        scratch = self._scratch(None)
        for start, end, bits in self._chunks():
            self._pair.write(start, end, _flat(values)[start:end].float().clone(), bits, scratch)

    def split(self, x: Tensor) -> Tensor:
        """``z``, fp32, of which ``x`` is the weight."""
        return (self._stored() if self.form == "coupled" else x.detach().float()) * self.mask

    def dual(self, penalty: float) -> Tensor:
        """``u = y / penalty``, fp32, zero on the support and at a penalty of 0 (which has built up no dual)."""
        return self._stored() * select_by_bits(self._bits, self._shape, 0.0, _negated_inverse(penalty))

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
            on_support = 1.0 if self.form == "coupled" else 0.0
            for start, end, bits in self._chunks():
                values = v.view(-1)[start:end]
                if ascent < 1:
                    values.sub_(_flat(x)[start:end], alpha=1 - ascent)
                values.mul_(select_by_bits(bits, values.shape, on_support, -penalty, scratch.selection))
                self._pair.write(start, end, values, bits, scratch)
        return entered

    @torch.no_grad()
    def add_proximal_gradient_(self, grad: Tensor, x: Tensor, penalty: float, scratch: Scratch | None = None) -> None:
        """Coupled proximal term, in place: ``grad <- grad + penalty (x - z) + y``."""
        assert self.form == "coupled" and self._pair is not None
        scratch = self._scratch(scratch)
        for start, end, bits in self._chunks():
            stored = self._pair.read(start, end, bits, scratch)
            gradient = _flat(grad)[start:end]
            pull = _flat(x)[start:end].float() * penalty
            gradient.add_(pull)
            minus = select_by_bits(bits, stored.shape, -penalty, -1.0, scratch.selection)
            gradient.add_(torch.mul(stored, minus, out=pull))

    @torch.no_grad()
    def pull_(self, start: int, end: int, values: Tensor, penalty: float, scratch: Scratch) -> None:
        """Decoupled proximal step, in place: ``x <- x - penalty (x - z) - y``, ``0 <= penalty <= 1``.

        :param start: of a chunk of the weight, up to ``end``; see :func:`~elsa_modifier.admm.storage.chunks`
        :param values: the chunk, fp32
        """
        assert self.form == "decoupled"
        bits = self._bits_of(start, end)
        # x - z and y are zero on the support.
        values.mul_(select_by_bits(bits, values.shape, 1.0, 1.0 - penalty, scratch.selection))
        if self._pair is not None:
            values.add_(self._pair.read(start, end, bits, scratch))

    @torch.no_grad()
    def mask_(self, start: int, end: int, values: Tensor, scratch: Scratch) -> None:
        """Zero what is outside the mask, in place (as ``+0.0`` or ``-0.0``), of a chunk as in :meth:`pull_`."""
        values.mul_(select_by_bits(self._bits_of(start, end), values.shape, 1.0, 0.0, scratch.selection))

    @torch.no_grad()
    def residual_sums(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        """``||x - z||^2`` and ``||x||^2``, fp32, shape (2,): the primal residual is the root of their ratio."""
        scratch = self._scratch(scratch)
        sums = torch.zeros(2, device=x.device)
        for start, end, bits in self._chunks():
            weight = _flat(x)[start:end].float()
            if self.form == "coupled" and self._pair is not None:
                stored = self._pair.read(start, end, bits, scratch)
                gap = weight - stored * select_by_bits(bits, weight.shape, 1.0, 0.0, scratch.selection)
            else:
                gap = weight * select_by_bits(bits, weight.shape, 0.0, 1.0, scratch.selection)
            sums += torch.stack([torch.dot(gap, gap), torch.dot(weight, weight)])
        return sums

    def _select(self, scores: Tensor, select: Callable[[Tensor], Tensor] | None) -> Tensor:
        return sparse_mask(scores, self.keep, self.structure) if select is None else select(scores)

    def _point(self, x: Tensor, penalty: float, scratch: Scratch) -> Tensor:
        """``v = x + u``, fp32, in ``scratch``."""
        v = scratch.whole[: x.numel()]
        if self._pair is None:
            return v.copy_(_flat(x)).view(self._shape)
        for start, end, bits in self._chunks():
            stored = self._pair.read(start, end, bits, scratch)
            dual = select_by_bits(bits, stored.shape, 0.0, _negated_inverse(penalty), scratch.selection)
            torch.mul(stored, dual, out=v[start:end]).add_(_flat(x)[start:end])
        return v.view(self._shape)

    def _chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Start, end and packed mask of each part that is worked on at once."""
        for start, end in chunks(self._shape.numel(), self._bits.device):
            yield start, end, self._bits_of(start, end)

    def _bits_of(self, start: int, end: int) -> Tensor:
        return self._bits[start // 8 : -(-end // 8)]

    def _stored(self) -> Tensor:
        if self._pair is None or not self._shape.numel():
            return torch.zeros(self._shape, device=self._bits.device)
        scratch = self._scratch(None)
        return torch.cat([self._pair.read(*chunk, scratch).clone() for chunk in self._chunks()]).view(self._shape)

    def _scratch(self, scratch: Scratch | None) -> Scratch:
        return Scratch(self._shape.numel(), self._bits.device) if scratch is None else scratch


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


def _negated_inverse(penalty: float) -> float:
    return -1.0 / penalty if penalty > 0 else 0.0
