"""Perplexity of a causal language model on held-out text."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

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
    :param precision: ``bf16`` (autocast), ``fp32``, or ``auto``, as in a recipe
    :param title: of a progress bar; None shows none
    """
    device = next(model.parameters()).device
    # Weights in bf16 too would make a processor that does not multiply it take twenty times as long.
    in_bf16 = precision_on(device, precision) == "bf16"
    computing = torch.autocast(device.type, torch.bfloat16) if in_bf16 else _in_fp32(model)
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        batches = input_ids.long().to(device).split(batch_size)
        with computing:
            for rows in tqdm(batches, desc=title, unit="batch", dynamic_ncols=True, disable=title is None):
                total += float(next_token_loss(model, {"input_ids": rows, "labels": rows}))
                count += count_targets(rows)
    finally:
        model.train(was_training)
    return math.exp(min(total / count, 700.0))


@contextmanager
def _in_fp32(model: PreTrainedModel) -> Iterator[None]:
    """Parameters in fp32 within the context; bit for bit as they were afterwards."""
    narrow = {p: p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in narrow.items():
            parameter.data = parameter.data.to(dtype)
