"""The ADMM pair (z, u) of one weight, held as one dense tensor and one bit a weight.

With ``v = x + u`` and the mask ``M`` that the projection selects, ``z = v M`` and the new dual is
``u = v - z = v (1 - M)``: their supports are disjoint, so one tensor holds both. (Its form ``z - u`` is the reflection
``(2 Proj - I) v`` of Douglas-Rachford splitting.) That is 4.125 bytes a weight in fp32 where two tensors take 8, and
1.14 in the 8-bit formats.

Off the support it is the unscaled dual ``y = penalty * u`` that is stored. A schedule that changes the penalty must
leave ``y`` as it is and rescale ``u``; so nothing has to be done, and the proximal term is ``penalty (x - z) + y``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from elsa_modifier.admm.bitmask import count_entered, pack_bits, select_by_bits, unpack_bits
from elsa_modifier.admm.projection import MaskStructure, projection_scores, sparse_mask
from elsa_modifier.admm.rounding import round_stochastically_
from elsa_modifier.admm.storage import Scratch, StateDtype, StoredPair, chunks

__all__ = ["ADMMState"]


class ADMMState:
    """Split variable ``z`` and scaled dual ``u`` of one weight ``x``.

    Weights may be fp32, or bf16: then every change is rounded stochastically.

    :param x: the weight, contiguous; the state takes its shape and device
    :param keep: how many entries stay (an N:M structure decides this itself and ignores it)
    :param structure: the zero pattern
    :param free_support: between updates let ``z`` follow ``x`` on its support (partial minimization over ``z`` for a
        fixed support), so that only pruned weights feel the penalty
    :param dtype: what the pair is stored in; arithmetic is fp32
    :param scratch: for weights of at least this size; here and in the methods, None allocates
    """

    def __init__(
        self,
        x: Tensor,
        keep: int,
        structure: MaskStructure,
        *,
        free_support: bool = False,
        dtype: StateDtype = "fp32",
        scratch: Scratch | None = None,
    ) -> None:
        self.keep = keep
        self.structure = structure
        self.free_support = free_support
        self._shape = x.shape
        self._bits = pack_bits(sparse_mask(projection_scores(x.detach().float()), keep, structure))
        # z on the support, -y off it. At first z = Proj(x) and y = 0; a free support, where z is x, stores no z.
        self._pair = StoredPair(x.numel(), dtype, x.device, both_kinds=not free_support)
        if not free_support:
            scratch = self._scratch(scratch)
            for start, end, bits in self._chunks():
                chosen = select_by_bits(bits, torch.Size([end - start]), 1.0, 0.0, scratch.selection)
                self._pair.write(start, end, _flat(x)[start:end] * chosen, bits, scratch)

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
        return self._pair.nbytes + self._bits.nbytes

    def split(self, x: Tensor) -> Tensor:
        """``z``, fp32, of which ``x`` is the weight."""
        return (x.detach().float() if self.free_support else self._stored()) * self.mask

    def dual(self, penalty: float) -> Tensor:
        """``u = y / penalty``, fp32, zero on the support and at a penalty of 0 (which has built up no dual)."""
        return self._stored() * select_by_bits(self._bits, self._shape, 0.0, _negated_inverse(penalty))

    @torch.no_grad()
    def scores(self, x: Tensor, penalty: float, fisher: Tensor | None = None, scratch: Scratch | None = None) -> Tensor:
        """What :meth:`update` with the same arguments will rank: the scores of ``v = x + u``, fp32, a new tensor."""
        return projection_scores(self._point(x, penalty, self._scratch(scratch)), fisher)

    @torch.no_grad()
    def update(self, x: Tensor, penalty: float, fisher: Tensor | None = None, scratch: Scratch | None = None) -> Tensor:
        """z- and u-update: ``v = x + u``, ``z <- Proj(v)``, ``u <- v - z``. Returns how many entries entered the mask.

        :param x: the weight
        :param penalty: its value from now on; at 0 the dual stays zero
        :param fisher: diagonal Fisher of ``x`` for the objective-aware projection; None projects by magnitude
        :returns: zero-dimensional int64 tensor on the weight's device
        :raises ValueError: if ``x`` or ``fisher`` is not finite
        """
        scratch = self._scratch(scratch)
        v = self._point(x, penalty, scratch)
        new = pack_bits(sparse_mask(projection_scores(v, fisher), self.keep, self.structure))
        entered = count_entered(new, self._bits)
        self._bits = new
        for start, end, bits in self._chunks():
            values = v.view(-1)[start:end]
            values.mul_(
                select_by_bits(bits, values.shape, 0.0 if self.free_support else 1.0, -penalty, scratch.selection)
            )
            self._pair.write(start, end, values, bits, scratch)
        return entered

    @torch.no_grad()
    def pull_(self, x: Tensor, penalty: float, scratch: Scratch | None = None) -> None:
        """Decoupled proximal step, in place: ``x <- x - penalty (x - z) - y``, ``0 <= penalty <= 1``."""
        scratch = self._scratch(scratch)
        for start, end, _ in self._chunks():
            weight = _flat(x)[start:end]
            values = weight if weight.dtype == torch.float32 else scratch.weight[: end - start].copy_(weight)
            self.pull_entries_(start, end, values, penalty, scratch)
            if values is not weight:
                round_stochastically_(weight, values)

    def pull_entries_(self, start: int, end: int, values: Tensor, penalty: float, scratch: Scratch) -> None:
        """:meth:`pull_` on entries ``start`` to ``end``, one of the chunks of the weight, given as fp32 ``values``."""
        bits = self._bits_of(start, end)
        stored = self._pair.read(start, end, bits, scratch)
        if self.free_support:
            # The pair is zero on the support, so only the decay has to know the mask.
            decay = select_by_bits(bits, values.shape, 1.0, 1.0 - penalty, scratch.selection)
            torch.addcmul(stored, values, decay, out=values)
        else:
            values.mul_(1.0 - penalty)
            values.addcmul_(stored, select_by_bits(bits, values.shape, penalty, 1.0, scratch.selection))

    @torch.no_grad()
    def add_proximal_gradient_(self, grad: Tensor, x: Tensor, penalty: float, scratch: Scratch | None = None) -> None:
        """Coupled proximal term, in place: ``grad <- grad + penalty (x - z) + y``."""
        scratch = self._scratch(scratch)
        for start, end, bits in self._chunks():
            stored = self._pair.read(start, end, bits, scratch)
            weight, gradient = _flat(x)[start:end], _flat(grad)[start:end]
            on = 0.0 if self.free_support else penalty
            pull = torch.mul(weight, select_by_bits(bits, stored.shape, on, penalty, scratch.selection))
            gradient.add_(pull)
            if self.free_support:
                gradient.sub_(stored)
            else:
                minus = select_by_bits(bits, stored.shape, -penalty, -1.0, scratch.selection)
                gradient.add_(torch.mul(stored, minus, out=pull))

    @torch.no_grad()
    def apply_mask_(self, x: Tensor, scratch: Scratch | None = None) -> None:
        """Zero the weights outside the mask, in place (as ``+0.0`` or ``-0.0``)."""
        scratch = self._scratch(scratch)
        for start, end, _ in self._chunks():
            self.mask_entries_(start, end, _flat(x)[start:end], scratch)

    def mask_entries_(self, start: int, end: int, values: Tensor, scratch: Scratch) -> None:
        """:meth:`apply_mask_` on entries ``start`` to ``end``, one of the chunks of the weight."""
        values.mul_(select_by_bits(self._bits_of(start, end), values.shape, 1.0, 0.0, scratch.selection))

    @torch.no_grad()
    def residual_sums(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        """``||x - z||^2`` and ``||x||^2``, fp32, shape (2,): the primal residual is the root of their ratio."""
        scratch = self._scratch(scratch)
        sums = torch.zeros(2, device=x.device)
        for start, end, bits in self._chunks():
            weight = _flat(x)[start:end].float()
            if self.free_support:
                gap = weight * select_by_bits(bits, weight.shape, 0.0, 1.0, scratch.selection)
            else:
                stored = self._pair.read(start, end, bits, scratch)
                gap = weight - stored * select_by_bits(bits, weight.shape, 1.0, 0.0, scratch.selection)
            sums += torch.stack([torch.dot(gap, gap), torch.dot(weight, weight)])
        return sums

    def _point(self, x: Tensor, penalty: float, scratch: Scratch) -> Tensor:
        """``v = x + u``, fp32, in ``scratch``."""
        v = scratch.whole[: x.numel()]
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
        scratch = self._scratch(None)
        parts = [self._pair.read(*chunk, scratch).clone() for chunk in self._chunks()]
        return torch.cat(parts).view(self._shape) if parts else torch.zeros(self._shape)

    def _scratch(self, scratch: Scratch | None) -> Scratch:
        return Scratch(self._shape.numel(), self._bits.device) if scratch is None else scratch


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


def _negated_inverse(penalty: float) -> float:
    return -1.0 / penalty if penalty > 0 else 0.0
