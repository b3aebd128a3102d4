"""L-ADMM: each weight's least-squares problem by ADMM, the mask growing on the way (Boza, arXiv 2401.02938).

With inputs of norm 1, ``|w|`` is Wanda's score, and one inverse serves all rows and iterations.
"""

from torch import Tensor, linalg

from benchmarks.baselines.gradual import gradual_sparsity
from benchmarks.baselines.layer_wise import LayerWiseModifier, normalised
from elsa_modifier.admm import sparse_mask

__all__ = ["LADMMModifier", "l_admm"]


def l_admm(
    weight: Tensor, gram: Tensor, keep: int, *, iterations: int, selecting: int, damping: float, rho: float
) -> Tensor:
    """Sparse ``W`` (out, in) with a small ``tr (W - W0) H (W - W0)^T``.

    :param weight: ``W0`` (out, in), fp32
    :param gram: ``H`` (in, in), fp32, times any number
    :param keep: entries that stay
    :param iterations: of ADMM, each two products of the sizes of ``W`` and ``H`` at most
    :param selecting: the first so many choose a mask each, ever sparser (cubic); the last of these masks stays
    :param damping: of the normalised Gram matrix's diagonal, which is 1
    :param rho: penalty
    """
    x, gram, norms = normalised(weight, gram, damping=damping)
    target = x @ gram
    gram.diagonal().add_(rho)
    inverse = linalg.inv(gram)
    final = 1 - keep / weight.numel()
    u = x.new_zeros(x.shape)
    for iteration in range(iterations):
        v = x + u
        if iteration < selecting:
            now = gradual_sparsity(iteration + 1, steps=selecting, sparsity=final)
            mask = sparse_mask(v.abs().float(), weight.numel() - round(now * weight.numel()))
        z = v * mask
        u = v - z
        x = (target + rho * (z - u)) @ inverse
    return (x + u) * mask / norms


class LADMMModifier(LayerWiseModifier):
    """
    L-ADMM with the settings of the paper.

    :param sparsity: fraction of zeros in every Linear but ``lm_head``
    :param iterations: see :func:`l_admm`, as for those that follow
    """

    iterations: int = 20
    selecting: int = 15
    damping: float = 0.1
    rho: float = 1.0

    def pruned(self, weight: Tensor, gram: Tensor, keep: int) -> Tensor:
        return l_admm(
            weight,
            gram,
            keep,
            iterations=self.iterations,
            selecting=self.selecting,
            damping=self.damping,
            rho=self.rho,
        )
