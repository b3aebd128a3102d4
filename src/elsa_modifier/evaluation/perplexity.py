"""Perplexity of a causal language model on held-out text."""

import math

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from elsa_modifier.training.objective import count_targets, next_token_loss
from elsa_modifier.training.precision import PrecisionField, precision_on

__all__ = ["perplexity"]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    batch_size: int = 4,
    precision: PrecisionField = "auto",
    title: str | None = None,
) -> float:
    """``exp`` of the mean next-token cross-entropy, each sequence on its own.

    :param input_ids: (sequences, length) token ids without padding
    :param batch_size: sequences a forward pass
    :param precision: ``bf16`` (autocast), ``fp32`` for that of the weights, or ``auto``, as in a recipe
    :param title: of a progress bar; None shows none
    """
    device = next(model.parameters()).device
    autocast = precision_on(device, precision) == "bf16"
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        batches = input_ids.long().to(device).split(batch_size)
        for rows in tqdm(batches, desc=title, unit="batch", dynamic_ncols=True, disable=title is None):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                total += float(next_token_loss(model, {"input_ids": rows, "labels": rows}))
            count += count_targets(rows)
    finally:
        model.train(was_training)
    return math.exp(min(total / count, 700.0))
