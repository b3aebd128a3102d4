"""The true objective of the model: next-token cross-entropy over the whole network."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from elsa_modifier.training.data import IGNORED_LABEL

__all__ = ["count_targets", "next_token_loss"]


def count_targets(labels: Tensor) -> int:
    """How many tokens of (batch, length) ``labels`` are predicted: all but ignored ones and each sequence's first."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed next-token cross-entropy of a batch, zero-dimensional fp32, in nats.

    :param batch: model inputs and unshifted ``labels`` (batch, length), ``IGNORED_LABEL`` where nothing is predicted
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        batch["labels"][:, 1:].flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )
