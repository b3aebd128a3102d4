"""Gradual pruning, the textbook way of spending training tokens on sparsity (Zhu and Gupta, arXiv 1710.01878).

Adam trains the model. After every step the smallest weights are zeroed, and how many those are rises to the asked-for
number by a cubic over the first part of the run. A weight that is zero today may be large again after tomorrow's step.
"""

import torch
from torch import Tensor

from benchmarks.baselines.training import TrainingBaseline
from elsa_modifier.admm import sparse_mask

__all__ = ["GradualPruningModifier", "gradual_sparsity"]


def gradual_sparsity(step: int, *, steps: int, sparsity: float) -> float:
    """Fraction of zeros after a step, from 1, of a ramp that takes so many steps: ``s (1 - (1 - t/T)^3)``."""
    return sparsity * (1 - (1 - min(step / steps, 1.0)) ** 3)


class GradualPruningModifier(TrainingBaseline):
    """
    Prune a causal language model gradually.

    :param sparsity: fraction of zeros at the end, in every Linear but ``lm_head``
    :param fisher: rank weights by ``F w^2``, F being Adam's second moment, instead of ``|w|``
    :param ramp: fraction of the steps over which sparsity rises
    """

    sparsity: float
    fisher: bool = True
    ramp: float = 0.6

    def after_step(self, step: int, weights: list[Tensor], adam: torch.optim.Adam) -> None:
        """Prune."""
        ramp = round(self.ramp * self.steps)
        now = gradual_sparsity(step + 1, steps=ramp, sparsity=self.sparsity)
        for weight in weights:
            self._prune_(weight, now, adam.state[weight]["exp_avg_sq"])

    @torch.no_grad()
    def _prune_(self, weight: Tensor, sparsity: float, second_moment: Tensor) -> None:
        scores = weight.abs() * second_moment.sqrt() if self.fisher else weight.abs()
        weight.mul_(sparse_mask(scores, weight.numel() - round(sparsity * weight.numel())))
