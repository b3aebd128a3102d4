"""Perplexity of a causal language model on held-out text."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elsa_modifier.training.objective import count_targets, next_token_loss

__all__ = ["perplexity"]


@torch.no_grad()
def perplexity(model: PreTrainedModel, input_ids: Tensor, *, batch_size: int = 4) -> float:
    """``exp`` of the mean next-token cross-entropy, each sequence on its own, in bf16 autocast.

    :param input_ids: (sequences, length) token ids without padding
    :param batch_size: sequences a forward pass
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for rows in input_ids.long().to(device).split(batch_size):
            with torch.autocast(device.type, torch.bfloat16):
                total += float(next_token_loss(model, {"input_ids": rows, "labels": rows}))
            count += count_targets(rows)
    finally:
        model.train(was_training)
    return math.exp(min(total / count, 700.0))
