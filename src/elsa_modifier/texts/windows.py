"""A source of text as windows of tokens: counted, kept for the next run, mapped from the disk."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from loguru import logger
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from elsa_modifier.texts.cache import cache_directory, key_of
from elsa_modifier.texts.documents import documents, text_of
from elsa_modifier.texts.token_file import read_windows, write_windows

__all__ = ["Texts", "load_texts", "read_texts", "windows_of"]

# For the perplexity before and after: of a short text a twentieth, of a long one no more than takes a minute.
_HELD_OUT, _HELD_OUT_FRACTION = 32, 20
# Characters that are given to the tokenizer at a time, which works on several documents at once.
_BATCH = 2**20


class Texts(NamedTuple):
    """What a run trains on, and what it does not.

    :param training: a data set with ``input_ids``, as ``oneshot`` takes it
    :param held_out: (sequences, length) token ids; None if there is too little text
    :param windows: all of them, those to train on first
    """

    training: Dataset
    held_out: Tensor | None
    windows: Tensor


def load_texts(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | str,
    *,
    sequence_length: int = 2048,
    tokens: int | None = None,
) -> Dataset:
    """Text as a data set for ``oneshot``, tokenized once: the next call with the same text reads it from a cache.

    :param source: a file, a directory of ``.txt``, ``.md`` and ``.jsonl`` files, or a data set on the hub; see
        :func:`~elsa_modifier.texts.documents.documents`
    :param tokenizer: the model's, or the directory or name of it
    :param sequence_length: tokens of a row; the recipe's ``sequence_length``, at most the model's positions
    :param tokens: that the run goes over; no more are read. None reads all
    :returns: rows of ``input_ids``, mapped from the disk
    :raises ValueError: if there is no such text, or less than a row of it
    """
    if isinstance(tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    most = None if tokens is None else -(-tokens // sequence_length)
    return _as_dataset(windows_of(str(source), tokenizer, length=sequence_length, most=most, least=1))


def read_texts(source: str, tokenizer: PreTrainedTokenizerBase, *, length: int, tokens: int) -> Texts:
    """Documents one after the other, cut into windows; no more of them are read than the run can use.

    :param source: see :func:`~elsa_modifier.texts.documents.documents`
    :param length: tokens of a window
    :param tokens: that the run goes over
    :raises ValueError: if there is less text than two windows
    """
    used = -(-tokens // length)
    windows = windows_of(source, tokenizer, length=length, most=used + _HELD_OUT, least=2)
    # What the run has no use for costs nothing.
    held_out = min(_HELD_OUT, max(len(windows) // _HELD_OUT_FRACTION, len(windows) - used))
    if not held_out:
        logger.warning(
            f"{source} has {len(windows)} windows of {length} tokens: too few to hold any out to measure on."
        )
    count = len(windows) - held_out
    return Texts(_as_dataset(windows[:count]), windows[count:] if held_out else None, windows)


def windows_of(
    source: str, tokenizer: PreTrainedTokenizerBase, *, length: int, most: int | None = None, least: int = 1
) -> Tensor:
    """The tokens of a source, documents one after the other, each ended by the tokenizer's end of text.

    :param source: see :func:`~elsa_modifier.texts.documents.documents`
    :param length: tokens of a window
    :param most: windows after which no more is read
    :param least: windows that there have to be
    :returns: (windows, length) int32, mapped from the disk
    :raises ValueError: if there is no such source, or too little text
    """
    most = 2**40 // length if most is None else most
    directory = cache_directory()
    key = None if directory is None else key_of(source, tokenizer, length=length)
    with ExitStack() as stack:
        if directory is None or key is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tokens.safetensors"
        else:
            place = directory / "tokens" / f"{key}.safetensors"
            found = _from_cache(place, length=length, most=most)
            if found is not None:
                _tell(source, *found, f", from {place}")
                return _enough(found[0], source, least)
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                logger.warning(
                    f"Tokens cannot be kept in {directory} ({error.strerror}); they are made anew next time."
                )
                place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tokens.safetensors"
        stream = _Stream(source, tokenizer)
        write_windows(place, stream.pieces(), length=length, most=most, about=stream.about)
        # A mapped file may be deleted: what is mapped stays.
        windows, about = read_windows(place, length=length)
    _tell(source, windows, about, f", kept in {place}" if key else "")
    return _enough(windows, source, least, tokens=int(about["tokens"]))


@dataclass
class _Stream:
    """Tokens of documents, and a count of both."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    documents: int = 0
    tokens: int = 0
    complete: bool = False

    def pieces(self) -> Iterator[np.ndarray]:
        separator = self.tokenizer.eos_token_id
        with tqdm(desc="tokens", unit=" tokens", unit_scale=True, delay=3) as bar:
            for texts in self._batches():
                # Longer than the model takes at a time, which the tokenizer would warn of.
                for ids in self.tokenizer(texts, verbose=False)["input_ids"]:
                    if separator is not None and ids and ids[-1] != separator:
                        ids.append(separator)
                    self.documents += 1
                    self.tokens += len(ids)
                    bar.update(len(ids))
                    yield np.array(ids, dtype=np.int32)
        self.complete = True

    def about(self) -> dict[str, str]:
        return {
            "documents": str(self.documents),
            "tokens": str(self.tokens),
            "complete": str(self.complete).lower(),
        }

    def _batches(self) -> Iterator[list[str]]:
        batch: list[str] = []
        size = 0
        for document in documents(self.source):
            text = text_of(document, self.tokenizer)
            batch.append(text)
            size += len(text)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def _from_cache(file: Path, *, length: int, most: int) -> tuple[Tensor, dict[str, str]] | None:
    """The windows that were kept, if they are all there are or as many as are wanted."""
    if not file.exists():
        return None
    try:
        windows, about = read_windows(file, length=length)
        if len(windows) < most and about["complete"] != "true":
            return None
    except (ValueError, KeyError) as error:
        logger.warning(f"What was kept of the text is damaged, and is made anew: {error}")
        return None
    return windows[:most], about


def _tell(source: str, windows: Tensor, about: dict[str, str], where: str) -> None:
    documents = int(about["documents"])
    count = f"{int(about['tokens']):,} tokens in {documents:,} document{'' if documents == 1 else 's'}"
    read = count if about["complete"] == "true" else f"{count} (as much as the run uses)"
    logger.info(f"{source}: {read}; {len(windows):,} windows of {windows.shape[1]:,}{where}.")


def _enough(windows: Tensor, source: str, least: int, tokens: int | None = None) -> Tensor:
    if len(windows) < least:
        found = windows.numel() if tokens is None else tokens
        raise ValueError(
            f"data: {source} has {found:,} tokens; a run takes at least {least * windows.shape[1]:,}: pass more"
        )
    return windows


def _as_dataset(windows: Tensor) -> Dataset:
    """Rows of ``input_ids`` in the same memory."""
    flat = pa.array(windows.reshape(-1).numpy())
    return Dataset(pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(flat, windows.shape[1])}))
