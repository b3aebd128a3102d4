"""ALPS: the support by ADMM with a rising penalty, then the best weights on it (Meng et al., arXiv 2406.07831)."""

import torch
from loguru import logger
from torch import Tensor, linalg

from benchmarks.baselines.layer_wise import LayerWiseModifier, normalised
from elsa_modifier.admm import sparse_mask

__all__ = ["ALPSModifier", "alps_support", "conjugate_gradients", "next_penalty"]

_INTERVAL = 3  # iterations between two looks at the support


def next_penalty(rho: float, changed: int, keep: int) -> float:
    """The penalty after some entries (a swap counts as two) of a support of ``keep`` have changed: faster for more."""
    if changed >= 0.1 * keep:
        return 1.3 * rho
    return 1.2 * rho if changed >= 0.005 * keep else 1.1 * rho


def alps_support(weight: Tensor, gram: Tensor, keep: int, *, rho: float, iterations: int) -> tuple[Tensor, Tensor]:
    """ADMM until three iterations leave the support as it was.

    One eigendecomposition of H, in fp64, serves every penalty.

    :param weight: ``W0`` (out, in), fp32
    :param gram: ``H`` (in, in), fp32, positive definite
    :param keep: entries of the support
    :param rho: the first penalty
    :param iterations: at most
    :returns: the sparse iterate (out, in) and its support, bool (out, in)
    """
    values, vectors = (part.to(weight.dtype) for part in linalg.eigh(gram.double()))
    target = weight @ gram
    mask = sparse_mask(weight.abs().float(), keep)
    sparse, dual = weight * mask, torch.zeros_like(weight)
    before = mask
    for iteration in range(1, iterations + 1):
        dense = ((target - dual + rho * sparse) @ vectors / (values + rho)) @ vectors.T
        point = dense + dual / rho
        mask = sparse_mask(point.abs().float(), keep)
        sparse = point * mask
        dual = rho * (point - sparse)
        if iteration % _INTERVAL == 0:
            changed = int((mask ^ before).sum())
            if changed == 0:
                break
            rho, before = next_penalty(rho, changed, keep), mask
    else:
        logger.warning(f"the support still changes after {iterations} iterations")
    return sparse, mask


def conjugate_gradients(start: Tensor, target: Tensor, gram: Tensor, mask: Tensor, *, iterations: int) -> Tensor:
    """Towards the ``W`` of the given support that minimizes ``tr W H W^T - 2 tr W T^T``, every row for itself.

    Residuals are projected on the support and preconditioned by the diagonal of H.

    :param start: (out, in), zero outside the support
    :param target: ``T = W0 H`` (out, in)
    :param gram: ``H`` (in, in)
    :param mask: the support, bool (out, in)
    """
    tiny = torch.finfo(start.dtype).tiny
    diagonal = gram.diagonal()
    found = start
    residual = (target - start @ gram) * mask
    direction = residual / diagonal
    energy = (residual * direction).sum(1, keepdim=True)
    for _ in range(iterations):
        image = (direction @ gram) * mask
        step = energy / (direction * image).sum(1, keepdim=True).clamp_min(tiny)
        found = found + step * direction
        residual = residual - step * image
        scaled = residual / diagonal
        energy, last = (residual * scaled).sum(1, keepdim=True), energy
        direction = scaled + energy / last.clamp_min(tiny) * direction
    return found


class ALPSModifier(LayerWiseModifier):
    """
    ALPS with the settings of the paper.

    :param sparsity: fraction of zeros in every Linear but ``lm_head``
    :param rho: the first penalty
    :param iterations: of ADMM, at most
    :param refinements: conjugate gradient steps on the support
    :param damping: of the normalised Gram matrix's diagonal, which is 1
    """

    rho: float = 0.1
    iterations: int = 300
    refinements: int = 10
    damping: float = 0.01

    def pruned(self, weight: Tensor, gram: Tensor, keep: int) -> Tensor:
        scaled, gram, norms = normalised(weight, gram, damping=self.damping)
        sparse, mask = alps_support(scaled, gram, keep, rho=self.rho, iterations=self.iterations)
        return conjugate_gradients(sparse, scaled @ gram, gram, mask, iterations=self.refinements) / norms
