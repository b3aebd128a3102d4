"""The ADMM pair (z, u) of one weight, held as one dense tensor and one bit a weight.

With ``v = x + u`` and the mask ``M`` that the projection selects, ``z = v M`` and the new dual is
``u = v - z = v (1 - M)``: their supports are disjoint, so one tensor holds both. (Its form ``z - u`` is the reflection
``(2 Proj - I) v`` of Douglas-Rachford splitting.) That is 4.125 bytes a weight in fp32 where two tensors take 8.

Off the support it is the unscaled dual ``y = penalty * u`` that is stored. A schedule that changes the penalty must
leave ``y`` as it is and rescale ``u``; so nothing has to be done, and the proximal term is ``penalty (x - z) + y``.
"""

import torch
from torch import Tensor

from elsa_modifier.admm.bitmask import count_entered, pack_bits, select_by_bits, unpack_bits
from elsa_modifier.admm.projection import MaskStructure, projection_scores, sparse_mask

__all__ = ["ADMMState"]


class ADMMState:
    """Split variable ``z`` and scaled dual ``u`` of one weight ``x``.

    :param x: the weight, fp32; the state takes its shape and device
    :param keep: how many entries stay (an N:M structure decides this itself and ignores it)
    :param structure: the zero pattern
    :param free_support: between updates let ``z`` follow ``x`` on its support (partial minimization over ``z`` for a
        fixed support), so that only pruned weights feel the penalty
    """

    def __init__(self, x: Tensor, keep: int, structure: MaskStructure, *, free_support: bool = False) -> None:
        self.keep = keep
        self.structure = structure
        self.free_support = free_support
        mask = sparse_mask(projection_scores(x.detach()), keep, structure)
        self._bits = pack_bits(mask)
        # z on the support, -y off it. At first z = Proj(x) and y = 0; a free support, where z is x, stores no z.
        self._pair = torch.zeros_like(x) if free_support else x.detach() * mask

    @property
    def mask(self) -> Tensor:
        """Kept entries, bool, the shape of the weight."""
        return unpack_bits(self._bits, self._pair.shape)

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
        return (x.detach() if self.free_support else self._pair) * self.mask

    def dual(self, penalty: float) -> Tensor:
        """``u = y / penalty``, fp32, zero on the support and at a penalty of 0 (which has built up no dual)."""
        return self._pair * select_by_bits(self._bits, self._pair.shape, 0.0, _negated_inverse(penalty))

    @torch.no_grad()
    def scores(self, x: Tensor, penalty: float, fisher: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
        """What :meth:`update` with the same arguments will rank: the scores of ``v = x + u``, fp32, a new tensor."""
        dual = select_by_bits(self._bits, x.shape, 0.0, _negated_inverse(penalty), scratch).mul_(self._pair)
        return projection_scores(dual.add_(x), fisher)

    @torch.no_grad()
    def update(self, x: Tensor, penalty: float, fisher: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
        """z- and u-update: ``v = x + u``, ``z <- Proj(v)``, ``u <- v - z``. Returns how many entries entered the mask.

        :param x: the weight
        :param penalty: its value from now on; at 0 the dual stays zero
        :param fisher: diagonal Fisher of ``x`` for the objective-aware projection; None projects by magnitude
        :param scratch: as for :meth:`pull_`
        :returns: zero-dimensional int64 tensor on the weight's device
        :raises ValueError: if ``x`` or ``fisher`` is not finite
        """
        # The pair becomes v in place: nothing the size of the weight is held twice but the scores.
        v = self._pair.mul_(select_by_bits(self._bits, x.shape, 0.0, _negated_inverse(penalty), scratch)).add_(x)
        bits = pack_bits(sparse_mask(projection_scores(v, fisher), self.keep, self.structure))
        v.mul_(select_by_bits(bits, x.shape, 0.0 if self.free_support else 1.0, -penalty, scratch))
        entered = count_entered(bits, self._bits)
        self._bits = bits
        return entered

    @torch.no_grad()
    def pull_(self, x: Tensor, penalty: float, scratch: Tensor | None = None) -> None:
        """Decoupled proximal step, in place: ``x <- x - penalty (x - z) - y``, ``0 <= penalty <= 1``.

        :param scratch: fp32 buffer of at least ``x.numel() + 7`` entries that the step may overwrite
        """
        if self.free_support:
            # The pair is zero on the support, so only the decay has to know the mask.
            torch.addcmul(self._pair, x, select_by_bits(self._bits, x.shape, 1.0, 1.0 - penalty, scratch), out=x)
        else:
            x.mul_(1.0 - penalty)
            x.addcmul_(self._pair, select_by_bits(self._bits, x.shape, penalty, 1.0, scratch))

    @torch.no_grad()
    def add_proximal_gradient_(self, grad: Tensor, x: Tensor, penalty: float, scratch: Tensor | None = None) -> None:
        """Coupled proximal term, in place: ``grad <- grad + penalty (x - z) + y``.

        :param scratch: as for :meth:`pull_`
        """
        if self.free_support:
            grad.addcmul_(x, select_by_bits(self._bits, x.shape, 0.0, penalty, scratch)).sub_(self._pair)
        else:
            grad.add_(x, alpha=penalty)
            grad.addcmul_(self._pair, select_by_bits(self._bits, x.shape, -penalty, -1.0, scratch))

    @torch.no_grad()
    def apply_mask_(self, x: Tensor, scratch: Tensor | None = None) -> None:
        """Zero the weights outside the mask, in place (as ``+0.0`` or ``-0.0``)."""
        x.mul_(select_by_bits(self._bits, x.shape, 1.0, 0.0, scratch))

    @torch.no_grad()
    def residual_sums(self, x: Tensor, scratch: Tensor | None = None) -> Tensor:
        """``||x - z||^2`` and ``||x||^2``, fp32, shape (2,): the primal residual is the root of their ratio."""
        if self.free_support:
            gap = x * select_by_bits(self._bits, x.shape, 0.0, 1.0, scratch)
        else:
            gap = x - self._pair * select_by_bits(self._bits, x.shape, 1.0, 0.0, scratch)
        return torch.stack([gap.pow_(2).sum(), x.square().sum()])


def _negated_inverse(penalty: float) -> float:
    return -1.0 / penalty if penalty > 0 else 0.0
