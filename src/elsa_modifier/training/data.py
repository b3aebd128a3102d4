"""From llm-compressor's calibration DataLoader to training batches of full sequences."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from llmcompressor.datasets.utils import DataCollatorWithTruncation
from loguru import logger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from elsa_modifier.training.digest import sha256_of
from elsa_modifier.training.randomness import random_states, restore_random_states

__all__ = [
    "IGNORED_LABEL",
    "BatchSource",
    "LoaderBatches",
    "PackedBatches",
    "ResumableSource",
    "batches_from_calibration",
    "pack_documents",
]

IGNORED_LABEL = -100
# Columns that have one entry for each token.
_ALIGNED = ("input_ids", "attention_mask", "labels")
# Up to here another pass over the same text is worth nearly as much as new text (arXiv 2305.16264).
_EPOCHS_AS_GOOD_AS_NEW = 4.0


class BatchSource(Protocol):
    """What the training loop reads."""

    def micro_batches(self, step: int) -> list[dict[str, Tensor]]:
        """The micro-batches of an optimizer step: model inputs and ``labels``, int64, (batch, length) each."""


class ResumableSource(BatchSource, Protocol):
    """Batches that another process can go on with."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells these data from others, in JSON's types."""

    def position(self) -> dict[str, Tensor]:
        """What it takes, beside the number of the step, to go on with the next one in another process."""

    def restore_position(self, position: Mapping[str, Tensor]) -> None:
        """Be where another source of the same data was.

        :raises ValueError: if the data are found to be others
        """


class PackedBatches:
    """An endless cycle over equally long sequences, whose order is a function of the seed and the step alone.

    Every epoch visits each sequence once, in an order of its own.

    :param input_ids: (sequences, length) token ids
    :param labels: the same shape; ``IGNORED_LABEL`` where a token is not to be predicted
    :param batch_size: sequences a micro-batch
    :param accumulation: micro-batches a step
    """

    def __init__(self, input_ids: Tensor, labels: Tensor, *, batch_size: int, accumulation: int, seed: int) -> None:
        self.input_ids = input_ids
        self.labels = labels
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self._epoch = -1

    def micro_batches(self, step: int) -> list[dict[str, Tensor]]:
        first = step * self.batch_size * self.accumulation
        indices = [self._sequence(first + i) for i in range(self.batch_size * self.accumulation)]
        return [
            {"input_ids": self.input_ids[rows].long(), "labels": self.labels[rows].long()}
            for rows in torch.tensor(indices).split(self.batch_size)
        ]

    def fingerprint(self) -> dict[str, Any]:
        return {
            "sequences": len(self.input_ids),
            "tokens in a sequence": self.input_ids.shape[1],
            "sequences in a micro-batch": self.batch_size,
            "micro-batches in a step": self.accumulation,
            "SHA-256 of tokens and labels": sha256_of(self.input_ids, self.labels),
        }

    def position(self) -> dict[str, Tensor]:
        return {}  # the number of the step says it all

    def restore_position(self, position: Mapping[str, Tensor]) -> None:
        pass

    def _sequence(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.input_ids))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.input_ids))
        return int(self._order[offset])


class LoaderBatches:
    """A DataLoader that the user built, as it is and over and over; padding is masked out of the loss.

    The loader decides the batch size and the order. Its place cannot be asked for. It is found again by beginning its
    epoch anew, with random generators as they were then, and taking as many batches: that they are the same is checked.
    """

    def __init__(self, loader: DataLoader[Any], *, accumulation: int) -> None:
        self.accumulation = accumulation
        self._loader = loader
        self._batches = self._cycle()
        self._began: dict[str, Tensor] = {}
        self._taken = 0
        self._digest = hashlib.sha256()

    def micro_batches(self, step: int) -> list[dict[str, Tensor]]:
        return [self._next() for _ in range(self.accumulation)]

    def fingerprint(self) -> dict[str, Any]:
        return {"micro-batches in a step": self.accumulation}

    def position(self) -> dict[str, Tensor]:
        digest = torch.frombuffer(bytearray(self._digest.digest()), dtype=torch.uint8)
        began = {f"began.{name}": state for name, state in self._began.items()}
        return began | {"taken": torch.tensor(self._taken), "sha256": digest}

    def restore_position(self, position: Mapping[str, Tensor]) -> None:
        began = {n.removeprefix("began."): state for n, state in position.items() if n.startswith("began.")}
        if not began:
            return
        now = random_states()
        restore_random_states(began)
        try:
            for name, generator in self._generators().items():
                if name in began:
                    generator.set_state(began[name])
            for _ in range(int(position["taken"])):
                self._next()
        finally:
            restore_random_states(now)
        if not torch.equal(self.position()["sha256"], position["sha256"]):
            raise ValueError(
                "data: the DataLoader's first batches of an epoch are not those that the training checkpoint has seen. "
                "Pass the same DataLoader, one whose order depends on nothing but random generators"
            )

    def _next(self) -> dict[str, Tensor]:
        batch = self._with_labels(*next(self._batches))
        self._digest.update(sha256_of(batch["input_ids"], batch["labels"]).encode())
        self._taken += 1
        return batch

    def _cycle(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        while True:
            own = {name: generator.get_state() for name, generator in self._generators().items()}
            self._began, self._taken, self._digest = random_states() | own, 0, hashlib.sha256()
            empty = True
            for index, batch in enumerate(self._loader):
                empty = False
                yield index, batch
            if empty:
                raise ValueError("the dataset's DataLoader yields no batch; ELSA needs training text")

    def _generators(self) -> dict[str, torch.Generator]:
        """Those that the loader's order is drawn from, beside the default ones."""
        found = {"loader": self._loader.generator, "sampler": getattr(self._loader.sampler, "generator", None)}
        return {name: generator for name, generator in found.items() if generator is not None}

    @staticmethod
    def _with_labels(index: int, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            kind = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"a batch of the DataLoader is {kind}; ELSA needs a mapping with 'input_ids'")
        tensors = {key: torch.as_tensor(value) for key, value in batch.items()}
        shapes = {key: tuple(tensors[key].shape) for key in _ALIGNED if key in tensors}
        if len(shapes["input_ids"]) != 2 or len(set(shapes.values())) > 1:
            raise ValueError(
                f"batch {index} of the DataLoader (from 0) has shapes {shapes}; allowed is (sequences, tokens), the "
                "same for all of these: one label and one mask entry for each token, none shifted"
            )
        labels = tensors.get("labels", tensors["input_ids"]).long()
        if "attention_mask" in tensors:
            labels = labels.masked_fill(tensors["attention_mask"] == 0, IGNORED_LABEL)
        return tensors | {"labels": labels}


def pack_documents(
    dataset: Dataset, *, length: int, max_tokens: int, separator: int | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Concatenate tokenized documents, in an order drawn from the seed, and cut the stream into full sequences.

    Padding (``attention_mask`` 0) is dropped. Documents of exactly ``length`` tokens are windows of a longer text and
    get no separator.

    :param dataset: rows with ``input_ids`` and optionally ``attention_mask`` and ``labels``
    :param max_tokens: how many tokens the run can use; no more documents are read
    :param separator: token put between documents that do not end with it; None puts none
    :returns: ids and labels, int32, (sequences, length)
    :raises ValueError: if there is less text than one sequence, or a row has not one label and mask entry a token
    """
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    total = 0
    columns = [c for c in _ALIGNED if c in dataset.column_names]
    order = np.random.default_rng(seed).permutation(len(dataset))
    indices = iter(order.tolist())
    for rows in dataset.select_columns(columns).select(order).with_format(None).iter(256):
        for i in range(len(rows["input_ids"])):
            row_ids, row_labels = _document(next(indices), {c: rows[c][i] for c in columns})
            if len(row_ids) == 0:
                continue
            if separator is not None and len(row_ids) != length and row_ids[-1] != separator:
                row_ids, row_labels = np.append(row_ids, separator), np.append(row_labels, separator)
            ids.append(row_ids)
            labels.append(row_labels)
            total += len(row_ids)
        if total >= max_tokens + length:
            break
    if total < length:
        lower = f", or set sequence_length to {total} or less" if total > 1 else ""
        raise ValueError(
            f"the dataset holds {total} tokens, and a sequence takes {length}: not enough to train on. Pass more "
            f"text{lower}"
        )
    return _windows(ids, length), _windows(labels, length)


def _document(index: int, row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    ids, mask, labels = (
        np.asarray(row["input_ids"] if row.get(column) is None else row[column]).reshape(-1) for column in _ALIGNED
    )
    for column, entries in (("attention_mask", mask), ("labels", labels)):
        if len(entries) != len(ids):
            raise ValueError(
                f"row {index} of the dataset (from 0) has {len(ids)} input_ids and {len(entries)} entries in {column}; "
                "allowed is one for each token, none shifted"
            )
    real = np.full(len(ids), True) if row.get("attention_mask") is None else mask != 0
    return ids[real].astype(np.int32), labels[real].astype(np.int32)


def _windows(parts: list[np.ndarray], width: int) -> Tensor:
    stream = np.concatenate(parts)
    return torch.from_numpy(stream[: len(stream) // width * width].reshape(-1, width))


def batches_from_calibration(
    loader: DataLoader[Any],
    *,
    steps: int,
    batch_size: int,
    accumulation: int,
    length: int,
    separator: int | None,
    seed: int,
) -> ResumableSource:
    """Batches for a run, from the DataLoader that llm-compressor hands to a modifier.

    A loader that llm-compressor made from a text or token dataset is taken apart: all of its documents are packed into
    full sequences, whatever ``num_calibration_samples`` says. A loader of the user's own is used as it is.

    :param steps: optimizer steps of the run
    :param length: tokens a sequence
    """
    packable = isinstance(loader.dataset, Dataset) and "input_ids" in loader.dataset.column_names
    if not packable or not isinstance(loader.collate_fn, DataCollatorWithTruncation | DataCollatorWithPadding):
        with suppress(TypeError):  # not every loader has a length
            _tell_epochs(steps * accumulation / max(1, len(loader)))
        return LoaderBatches(loader, accumulation=accumulation)
    max_tokens = steps * batch_size * accumulation * length
    ids, labels = pack_documents(loader.dataset, length=length, max_tokens=max_tokens, separator=separator, seed=seed)
    logger.info(f"Training text: {ids.numel():,} tokens in {len(ids):,} sequences of {ids.shape[1]}.")
    _tell_epochs(steps * batch_size * accumulation / len(ids))
    return PackedBatches(ids, labels, batch_size=batch_size, accumulation=accumulation, seed=seed)


def _tell_epochs(epochs: float) -> None:
    message = f"The run goes over this text {epochs:.1f} times."
    if epochs > _EPOCHS_AS_GOOD_AS_NEW:
        logger.warning(
            f"{message} Beyond {_EPOCHS_AS_GOOD_AS_NEW:.0f} times the same text is worth much less than new text: "
            "pass more, or lower steps, batch_size or gradient_accumulation_steps."
        )
    else:
        logger.info(message)
