"""Perplexity of a model on windows of tokens, and how much its predictions are those of a dense one.

Logits are looked at in chunks of tokens, over the full vocabulary: what has to be held does not grow with the window.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from elsa_modifier.training.objective import chunk_rows, token_rows

__all__ = ["Scores", "score"]

# Tokens in a forward pass: one published window, or as many shorter ones.
_TOKENS = 2048
# Tokens whose logits are compared at a time; there are some six tensors of theirs, in fp32.
_ROWS = 256
# Of a perplexity: its logarithm, that it may be a number.
_LARGEST = 700.0


@dataclass(frozen=True)
class Scores:
    """Sums over the predicted tokens of a text, made means.

    :param tokens: how many were predicted: all but each window's first
    :param perplexity: exp of the mean cross-entropy
    :param dense_perplexity: of the dense model; None without one, and so the two below
    :param top1: fraction of tokens where both models find the same one most likely
    :param kl: mean of KL(dense || model), nats
    """

    tokens: int
    perplexity: float
    dense_perplexity: float | None = None
    top1: float | None = None
    kl: float | None = None


@torch.no_grad()
def score(
    model: PreTrainedModel, windows: Tensor, *, dense: PreTrainedModel | None = None, title: str = "perplexity"
) -> Scores:
    """Measure a model on a text, beside a dense one if there is one; each in its own dtype, without autocast.

    :param model: on whichever device
    :param windows: (windows, length) token ids, int64; every window on its own
    :param dense: on the same device, with the same vocabulary
    :param title: of the progress bar
    :raises ValueError: if the vocabularies are not the same
    """
    device = next(model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    batch = max(1, _TOKENS // windows.shape[1])
    with tqdm(total=len(windows), desc=title, unit="window", delay=2) as bar:
        for ids in windows.split(batch):
            sums += _sums(model, dense, ids.to(device))
            bar.update(len(ids))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    loss, dense_loss, agreed, divergence = (float(total) / tokens for total in sums)
    if dense is None:
        return Scores(tokens, _perplexity(loss))
    return Scores(tokens, _perplexity(loss), _perplexity(dense_loss), agreed, divergence)


def _sums(model: PreTrainedModel, dense: PreTrainedModel | None, ids: Tensor) -> Tensor:
    """(4,) fp64: cross-entropy of the model and of the dense one, tokens on which they agree, KL."""
    batch = {"input_ids": ids, "labels": ids}
    size = chunk_rows(model, batch)
    found = token_rows(model, batch, size)
    wanted = None if dense is None else token_rows(dense, batch, size)
    sums = torch.zeros(4, dtype=torch.float64, device=ids.device)
    for first in range(0, len(found.rows), _ROWS):
        rows = slice(first, first + _ROWS)
        targets = found.targets[rows]
        logits = F.log_softmax(found.head(found.rows[rows]).float(), dim=-1)
        sums[0] += F.nll_loss(logits, targets, reduction="none").double().sum()
        if wanted is None:
            continue
        taught = F.log_softmax(wanted.head(wanted.rows[rows]).float(), dim=-1)
        if taught.shape != logits.shape:
            raise ValueError(
                f"the dense model has {taught.shape[1]:,} words and the model {logits.shape[1]:,}: they cannot be "
                "compared. Name the model that this one was made from, --dense MODEL, or leave it out, --no-dense"
            )
        sums[1] += F.nll_loss(taught, targets, reduction="none").double().sum()
        sums[2] += (taught.argmax(-1) == logits.argmax(-1)).sum()
        sums[3] += F.kl_div(logits, taught, log_target=True, reduction="none").double().sum()
    return sums


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, _LARGEST))
