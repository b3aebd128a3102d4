"""Objectives with a teacher: the dense model, as it was before the run, in bf16 where
the processor multiplies it.

The next token is one word; the teacher's distribution over the whole vocabulary says more about each position, and its
hidden states more still. What that is worth in a short run: docs/results/ablation.md.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from elsa_modifier.training.data import IGNORED_LABEL
from elsa_modifier.training.layers import layer_outputs
from elsa_modifier.training.model_state import trained_dtype
from elsa_modifier.training.objective import TokenRows, chunk_rows, sum_over_tokens, token_rows
from elsa_modifier.training.precision import teacher_dtype

__all__ = ["Distillation", "copy_as_teacher", "default_teacher_weight"]


def copy_as_teacher(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in evaluation mode that needs no gradients, its matrices rounded to bf16 and held in
    :func:`.teacher_dtype`: the same teacher on every device, and never the model itself, towards which all gradients
    would be rounding alone."""
    copies: dict[int, Tensor] = {id(buffer): buffer.clone() for buffer in model.buffers()}
    for parameter in model.parameters():
        floating = parameter.is_floating_point()
        rounded = trained_dtype(parameter, torch.bfloat16) if floating else parameter.dtype
        held = parameter.detach().to(rounded, copy=True)
        if floating:
            held = held.to(trained_dtype(parameter, teacher_dtype(parameter.device)))
        copies[id(parameter)] = nn.Parameter(held, requires_grad=False)
    return copy.deepcopy(model, memo=copies).eval()


def default_teacher_weight(sparsity: float) -> float:
    """How much the teacher counts where nobody says: 0.5 up to a sparsity of 50%, 1 from 80%, in proportion between.

    A model that keeps half of its weights is soon as good as its teacher, whose distribution is not quite that of the
    text: then the text has more to say. One that keeps few has to learn more than single words tell in a short run.

    :param sparsity: fraction of zeros over all pruned weights
    """
    return 0.5 + 0.5 * min(max((sparsity - 0.5) / 0.3, 0.0), 1.0)


class Distillation:
    """``next_token`` x cross-entropy + ``logits`` x KL + ``hidden`` x error, an
    :data:`~elsa_modifier.training.objective.Objective`.

    KL is ``KL(teacher || model)`` over the full vocabulary, both at a temperature ``T``, times ``T^2`` (Hinton et al.,
    arXiv 1503.02531). The error is ``||h - h_teacher||^2 / ||h_teacher||^2`` of each predicting token's hidden state
    after a decoder layer, the mean over layers (as SquareHead, arXiv 2310.06927, but normalized for each token: a few
    have hidden states a hundred times as large as the others).

    :param teacher: see :func:`copy_as_teacher`
    :param next_token: weight of the cross-entropy with the next token
    :param logits: weight of the KL divergence
    :param hidden: weight of the hidden states' error
    :param temperature: of both distributions
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        *,
        next_token: float,
        logits: float,
        hidden: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        self.teacher = teacher
        self._next_token = next_token
        self._logits = logits
        self._hidden = hidden
        self._temperature = temperature

    def __call__(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        device = batch["input_ids"].device
        size = chunk_rows(model, batch)
        with _computing_as_teacher(device), self._hidden_states_of(self.teacher) as wanted:
            taught = token_rows(self.teacher, batch, size)
        with self._hidden_states_of(model) as found:
            tokens = token_rows(model, batch, size)
        loss = torch.zeros((), device=device)
        if self._next_token or self._logits:
            loss = loss + self._of_logits(tokens, taught)
        if self._hidden:
            # Nothing is kept for the backward pass but the hidden states themselves.
            errors = [
                checkpoint(_relative_error, a, b, use_reentrant=False) for a, b in zip(found, wanted, strict=True)
            ]
            predicts = (batch["labels"][:, 1:] != IGNORED_LABEL).float()
            loss = loss + self._hidden * (torch.stack(errors).mean(dim=0)[:, :-1] * predicts).sum()
        return loss

    def _hidden_states_of(self, model: PreTrainedModel) -> AbstractContextManager[list[Tensor]]:
        # Not held where nothing is made of them: those of a teacher would stay for the whole of a step.
        return layer_outputs(model) if self._hidden else contextlib.nullcontext([])

    def _of_logits(self, tokens: TokenRows, taught: TokenRows) -> Tensor:
        def divergence(part: Tensor, teacher_part: Tensor, targets: Tensor) -> Tensor:
            with _computing_as_teacher(part.device):
                wanted = F.log_softmax(taught.head(teacher_part).float() / self._temperature, dim=-1)
            found = F.log_softmax(tokens.head(part).float(), dim=-1)
            loss = self._next_token * F.nll_loss(found, targets, ignore_index=IGNORED_LABEL, reduction="sum")
            if self._temperature != 1:
                found = F.log_softmax(found / self._temperature, dim=-1)
            predicted = (targets != IGNORED_LABEL).float()
            of_token = F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1)
            return loss + self._logits * self._temperature**2 * (of_token * predicted).sum()

        return sum_over_tokens(divergence, tokens, taught.rows)


@contextlib.contextmanager
def _computing_as_teacher(device: torch.device) -> Iterator[None]:
    # Its matrices do not follow the precision of the run.
    autocast = teacher_dtype(device) == torch.bfloat16
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        yield


def _relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """(batch, length)"""
    found, wanted = found.float(), wanted.float()
    tiny = torch.finfo(torch.float32).tiny
    return (found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(tiny)
