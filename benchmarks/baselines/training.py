"""The run that all baselines share which train the whole model: the same text in the same order, and the same steps.

Adam, gradients clipped, the learning rate falling linearly to 0. What a method does with the weights comes in between.
"""

from copy import deepcopy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.dev import get_main_device
from pydantic import PrivateAttr
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.magnitude import linear_sparsity, pruned_linears
from elsa_modifier.training.data import IGNORED_LABEL, batches_from_calibration
from elsa_modifier.training.model_state import trainable
from elsa_modifier.training.objective import count_targets, next_token_loss
from elsa_modifier.training.precision import multiplies_bf16, teacher_dtype

__all__ = ["TrainingBaseline", "distilled_loss"]


def distilled_loss(model: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], weight: float) -> Tensor:
    """``(1 - weight)`` x next-token cross-entropy + ``weight`` x KL of the teacher's to the model's whole distribution.

    :param batch: model inputs and unshifted ``labels`` (batch, length)
    :returns: sum over predicted tokens, zero-dimensional fp32, in nats
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    targets = batch["labels"][:, 1:].flatten()
    predicted = targets != IGNORED_LABEL
    with torch.no_grad():
        dense = teacher(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)[predicted].float().log_softmax(-1)
    found = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)[predicted].float().log_softmax(-1)
    cross_entropy = F.nll_loss(found, targets[predicted], reduction="sum")
    return (1 - weight) * cross_entropy + weight * F.kl_div(found, dense, log_target=True, reduction="sum")


class TrainingBaseline(Modifier):
    """
    Train a causal language model on the text and in the order that ELSAModifier would train on.

    :param steps: optimizer steps
    :param batch_size: sequences a step
    :param sequence_length: tokens a sequence
    :param lr: peak learning rate, falling linearly to 0
    :param objective: ``next_token``, or ``distill``: see :func:`distilled_loss`
    :param weight: of the KL divergence
    :param teacher: directory of the dense model for ``distill``, held as ELSA's is; None takes the model as it is
        before the first modifier of the recipe
    :param seed: of the order of the data and of dropout
    """

    steps: int
    batch_size: int
    sequence_length: int
    lr: float
    objective: Literal["next_token", "distill"] = "next_token"
    weight: float = 1.0
    teacher: str | None = None
    seed: int = 0

    _teacher: PreTrainedModel | None = PrivateAttr(None)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Keep the dense model, if it is to teach.

        :raises ValueError: if there is none
        """
        if self.objective == "distill":
            # A model that was rounded to 4 bits has a few zeros of its own.
            if self.teacher is None and linear_sparsity(state.model) > 0.1:
                raise ValueError(
                    f"teacher is None, and {linear_sparsity(state.model):.0%} of the model's weights are 0: name the "
                    "directory of the dense model"
                )
            dense = (
                deepcopy(state.model) if self.teacher is None else AutoModelForCausalLM.from_pretrained(self.teacher)
            )
            self._teacher = dense.to(get_main_device()).eval()
            # Not buffers: frequencies of rotary positions need fp32.
            for parameter in dense.parameters():
                parameter.data = parameter.data.to(teacher_dtype(parameter.device))
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Train."""
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
            self.before_training(weights)
            for step in range(self.steps):
                [batch] = batches.micro_batches(step)
                with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bf16(device)):
                    loss = self._loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
                (loss / count_targets(batch["labels"])).backward()
                self.before_clipping(weights)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                adam.param_groups[0]["lr"] = self.lr * (1 - step / self.steps)
                adam.step()
                adam.zero_grad()
                with torch.no_grad():
                    self.after_step(step, weights, adam)
        self._teacher = None

    def before_training(self, weights: list[Tensor]) -> None:
        """Called once, with the weights of every Linear but ``lm_head``, fp32, each (out, in)."""

    def before_clipping(self, weights: list[Tensor]) -> None:
        """Called in every step when their gradients are there."""

    def after_step(self, step: int, weights: list[Tensor], adam: torch.optim.Adam) -> None:
        """Called after every step, from 0, without gradients."""

    def _loss(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        if self._teacher is None:
            return next_token_loss(model, batch)
        return distilled_loss(model, self._teacher, batch, self.weight)
