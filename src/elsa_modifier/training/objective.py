"""The true objective of the model: next-token cross-entropy over the whole network.

Logits are the largest tensors of a run: with their gradient and what the loss keeps of them, 12 bytes or more for each
token and word of the vocabulary. Where it saves memory they are computed in chunks of tokens.
"""

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from loguru import logger
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from elsa_modifier.training.chunks import sum_in_chunks
from elsa_modifier.training.data import IGNORED_LABEL
from elsa_modifier.training.tail import run_body, tail_disagrees

__all__ = ["CHUNK_BYTES", "count_targets", "next_token_loss"]

CHUNK_BYTES = 2**29
"""Of a chunk's logits in fp32; the loss holds some four such tensors. With smaller chunks the head's gradient, as large
as the head, is added up more often: what that takes does not depend on the tokens."""

_in_chunks: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def count_targets(labels: Tensor) -> int:
    """How many tokens of (batch, length) ``labels`` are predicted: all but ignored ones and each sequence's first."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())


def next_token_loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed next-token cross-entropy of a batch, zero-dimensional fp32, in nats.

    :param batch: model inputs and unshifted ``labels`` (batch, length), ``IGNORED_LABEL`` where nothing is predicted
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    targets = batch["labels"][:, 1:].flatten()
    config = model.config.get_text_config()
    size = max(1, CHUNK_BYTES // (4 * config.vocab_size))
    # Beside a chunk the head's gradient waits, as large as the logits of half as many tokens as the model is wide.
    spent = getattr(config, "hidden_size", 0) // 2
    in_chunks = len(targets) > size + spent and _can_run_in_chunks(model, inputs["input_ids"])
    split = run_body(model, inputs) if in_chunks else None
    if split is None:
        return _cross_entropy(model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1), targets)
    hidden, tail = split
    rows = hidden[:, :-1].flatten(0, 1)
    predicted = targets != IGNORED_LABEL
    # Where tensors have no values, as in a plan, no sum is known and all rows stay.
    if 0 < int(predicted.sum()) < len(targets):
        rows, targets = rows[predicted], targets[predicted]
    return sum_in_chunks(lambda part, labels: _cross_entropy(tail(part), labels), rows, targets, size=size)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED_LABEL, reduction="sum")


def _can_run_in_chunks(model: PreTrainedModel, input_ids: Tensor) -> bool:
    """Whether logits of some tokens are those of all; found out once for a model, on a few of its first tokens."""
    if isinstance(input_ids, FakeTensor):
        return True  # nothing to compare
    if model not in _in_chunks:
        reason = tail_disagrees(model, input_ids[:2, :8])
        _in_chunks[model] = reason is None
        if reason is not None:
            size = 12e-9 * input_ids.numel() * model.config.get_text_config().vocab_size
            logger.warning(
                f"Logits of {type(model).__name__} cannot be computed in chunks of tokens: {reason}. Those of a whole "
                f"micro-batch take some {size:.1f} GB; a smaller batch_size takes less."
            )
    return _in_chunks[model]
