"""Gradual pruning, the textbook way of spending training tokens on sparsity (Zhu and Gupta, arXiv 1710.01878).

Adam trains the model. After every step the smallest weights are zeroed, and how many those are rises to the asked-for
number by a cubic over the first part of the run. A weight that is zero today may be large again after tomorrow's step.
"""

from typing import Any

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.dev import get_main_device
from torch import Tensor, nn

from benchmarks.magnitude import pruned_linears
from elsa_modifier.admm import sparse_mask
from elsa_modifier.training.data import batches_from_calibration
from elsa_modifier.training.model_state import trainable
from elsa_modifier.training.objective import count_targets, next_token_loss

__all__ = ["GradualPruningModifier", "gradual_sparsity"]


def gradual_sparsity(step: int, *, steps: int, sparsity: float) -> float:
    """Fraction of zeros after a step, from 1, of a ramp that takes so many steps: ``s (1 - (1 - t/T)^3)``."""
    return sparsity * (1 - (1 - min(step / steps, 1.0)) ** 3)


class GradualPruningModifier(Modifier):
    """
    Prune a causal language model gradually, on the text and in the order that ELSAModifier would train on.

    :param sparsity: fraction of zeros at the end, in every Linear but ``lm_head``
    :param lr: peak learning rate, falling linearly to 0
    :param fisher: rank weights by ``F w^2``, F being Adam's second moment, instead of ``|w|``
    :param ramp: fraction of the steps over which sparsity rises
    """

    sparsity: float
    steps: int
    batch_size: int
    sequence_length: int
    lr: float
    fisher: bool = True
    ramp: float = 0.6
    seed: int = 0

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Nothing is done before the run."""
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Train and prune."""
        model, device = state.model, get_main_device()
        batches = batches_from_calibration(
            state.data.calib,
            steps=self.steps,
            batch_size=self.batch_size,
            accumulation=1,
            length=self.sequence_length,
            separator=model.config.get_text_config().eos_token_id,
            seed=self.seed,
        )
        with trainable(model, device), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            adam = torch.optim.Adam(model.parameters(), lr=self.lr, fused=True)
            weights = [linear.weight for linear in pruned_linears(model)]
            for step in range(self.steps):
                [batch] = batches.micro_batches(step)
                with torch.autocast(device.type, torch.bfloat16):
                    loss = next_token_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
                (loss / count_targets(batch["labels"])).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                adam.param_groups[0]["lr"] = self.lr * (1 - step / self.steps)
                adam.step()
                adam.zero_grad()
                ramp = round(self.ramp * self.steps)
                now = gradual_sparsity(step + 1, steps=ramp, sparsity=self.sparsity)
                for weight in weights:
                    self._prune_(weight, now, adam.state[weight]["exp_avg_sq"])

    @torch.no_grad()
    def _prune_(self, weight: Tensor, sparsity: float, second_moment: Tensor) -> None:
        scores = weight.abs() * second_moment.sqrt() if self.fisher else weight.abs()
        weight.mul_(sparse_mask(scores, weight.numel() - round(sparsity * weight.numel())))
