"""The true objective of the model: next-token cross-entropy over the whole network.

Logits are the largest tensors of a run: with their gradient and what the loss keeps of them, 12 bytes or more for each
token and word of the vocabulary. Where it saves memory they are computed in chunks of tokens.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from loguru import logger
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from elsa_modifier.admm.placement import is_fused
from elsa_modifier.training.chunks import sum_in_chunks
from elsa_modifier.training.data import IGNORED_LABEL
from elsa_modifier.training.tail import run_body, tail_disagrees

__all__ = [
    "CHUNK_BYTES",
    "PREDICTED",
    "Objective",
    "TokenRows",
    "chunk_rows",
    "count_targets",
    "next_token_loss",
    "sum_over_tokens",
    "token_rows",
]

Objective = Callable[[PreTrainedModel, Mapping[str, Tensor]], Tensor]
"""A sum over the predicted tokens of a batch, zero-dimensional fp32: model inputs and unshifted ``labels`` (batch,
length), ``IGNORED_LABEL`` where nothing is predicted."""

CHUNK_BYTES = 2**29
"""Of a chunk's logits in fp32; the loss holds some four such tensors. With smaller chunks the head's gradient, as large
as the head, is added up more often: what that takes does not depend on the tokens."""

PREDICTED = "elsa_predicted"
"""Of a batch on an accelerator, if some of its tokens are not predicted: the positions of those that are, (tokens,), of
labels without each sequence's first, flattened. No input of a model."""

_in_chunks: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


class TokenRows(NamedTuple):
    """What a model has computed of a batch's predicted tokens, up to a function of each alone.

    :param rows: (tokens, width): the last hidden states, or the logits where there are no chunks
    :param head: from some of the rows to their logits, (tokens, vocabulary)
    :param targets: (tokens,) the words that followed
    :param size: rows of a chunk; None where there are none
    """

    rows: Tensor
    head: Callable[[Tensor], Tensor]
    targets: Tensor
    size: int | None


def count_targets(labels: Tensor) -> int:
    """How many tokens of (batch, length) ``labels`` are predicted: all but ignored ones and each sequence's first."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())


def next_token_loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy with the next token, in nats; an :data:`Objective`."""
    tokens = token_rows(model, batch, chunk_rows(model, batch))

    def cross_entropy(part: Tensor, targets: Tensor) -> Tensor:
        logits = tokens.head(part).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="sum")

    return sum_over_tokens(cross_entropy, tokens)


def chunk_rows(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> int | None:
    """How many tokens' logits are to be computed at a time; None for all, where chunks save nothing or cannot be."""
    config = model.config.get_text_config()
    size = max(1, CHUNK_BYTES // (4 * config.vocab_size))
    # Beside a chunk the head's gradient waits, as large as the logits of half as many tokens as the model is wide.
    spent = getattr(config, "hidden_size", 0) // 2
    saves = batch["labels"][:, 1:].numel() > size + spent
    return size if saves and _can_run_in_chunks(model, batch["input_ids"]) else None


def token_rows(model: PreTrainedModel, batch: Mapping[str, Tensor], size: int | None) -> TokenRows:
    """Run the model on a batch, up to its head if that is to run in chunks.

    :param size: see :func:`chunk_rows`
    """
    inputs = {key: value for key, value in batch.items() if key not in ("labels", PREDICTED)}
    targets = batch["labels"][:, 1:].flatten()
    split = run_body(model, inputs) if size is not None else None
    if split is None:
        logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        return TokenRows(logits, lambda part: part, targets, None)
    hidden, tail = split
    rows = hidden[:, :-1].flatten(0, 1)
    if PREDICTED in batch:
        rows, targets = (tensor.index_select(0, batch[PREDICTED]) for tensor in (rows, targets))
    elif not is_fused(targets.device):
        predicted = targets != IGNORED_LABEL
        # Where tensors have no values, as in a plan, no sum is known and all rows stay.
        if 0 < int(predicted.sum()) < len(targets):
            rows, targets = rows[predicted], targets[predicted]
    return TokenRows(rows, tail, targets, size)


def sum_over_tokens(loss_of: Callable[..., Tensor], tokens: TokenRows, *aligned: Tensor) -> Tensor:
    """``loss_of(rows, *aligned, targets)``, which must be a sum over rows, in chunks if ``tokens`` are to be.

    :param aligned: tensors with as many rows; they get no gradient
    """
    if tokens.size is None:
        return loss_of(tokens.rows, *aligned, tokens.targets)
    return sum_in_chunks(loss_of, tokens.rows, *aligned, tokens.targets, size=tokens.size)


def _can_run_in_chunks(model: PreTrainedModel, input_ids: Tensor) -> bool:
    """Whether logits of some tokens are those of all; found out once for a model, on a few of its first tokens."""
    if isinstance(input_ids, FakeTensor):
        return True  # nothing to compare
    if model not in _in_chunks:
        # Found out anew when a run is resumed, which must change nothing about what is drawn later.
        with torch.random.fork_rng():
            reason = tail_disagrees(model, input_ids[:2, :8])
        _in_chunks[model] = reason is None
        if reason is not None:
            size = 12e-9 * input_ids.numel() * model.config.get_text_config().vocab_size
            logger.warning(
                f"Logits of {type(model).__name__} cannot be computed in chunks of tokens: {reason}. Those of a whole "
                f"micro-batch take some {size:.1f} GB; a smaller batch_size takes less."
            )
    return _in_chunks[model]
