"""Texts that perplexity is measured on: WikiText-2 and C4 as published, or any text of one's own."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from elsa_modifier.texts.documents import documents, files_of, text_of
from elsa_sparse.errors import printable

__all__ = ["PUBLISHED", "WINDOW", "EvaluationText", "read_evaluation_texts"]

WINDOW = 2048
"""Tokens of a window, as published."""


@dataclass(frozen=True)
class EvaluationText:
    """A text in windows.

    :param name: what it is called in tables
    :param windows: (windows, length) token ids, int64
    """

    name: str
    windows: Tensor


def _wikitext2() -> Iterator[str]:
    """All of the test split, its lines with an empty one between."""
    yield "\n\n".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"])


def _c4() -> Iterator[str]:
    """The first 1,100 documents of the first validation file, with spaces between."""
    file = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    rows: Any = load_dataset("allenai/c4", data_files=file, split="validation", streaming=True)
    yield " ".join(row["text"] for row in rows.take(1100))


@dataclass(frozen=True)
class _Published:
    title: str
    read: Callable[[], Iterator[str]]
    most: int | None


PUBLISHED = {
    "wikitext2": _Published("WikiText-2", _wikitext2, None),
    "c4": _Published("C4", _c4, 256),
}
"""By the name that ``--data`` takes: title, text, and windows that are measured (None for all). The protocol is that
of SparseGPT (arXiv 2301.00774), Wanda and ELSA: one text, cut into windows that do not overlap; what is left of the
last one does not count."""


def read_evaluation_texts(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int = WINDOW,
    most: int | None = None,
) -> list[EvaluationText]:
    """Texts, each tokenized as a whole and cut into windows.

    :param sources: names of :data:`PUBLISHED`; or as of :func:`~elsa_modifier.texts.documents.documents`, whose
        documents are joined by empty lines
    :param window: tokens of a window; a text of one's own that is shorter is one window
    :param most: windows of a text, at most
    :raises ValueError: if a source cannot be read, or has no text; the message says what can be done
    """
    return [_read(source, tokenizer, window, most) for source in dict.fromkeys(sources)]


def _read(source: str, tokenizer: PreTrainedTokenizerBase, window: int, most: int | None) -> EvaluationText:
    published = PUBLISHED.get(source)
    if published is None:
        name = source if files_of(source) is None else Path(source).name
        limit = most
        # Of a data set on the hub no more than is used, four characters a token and more.
        text = "\n\n".join(_first(source, tokenizer, None if most is None else 32 * window * most))
    else:
        name = published.title
        limit = published.most if most is None else min(most, published.most or most)
        text = _from_hub(source, published)
    ids = tokenizer(text, verbose=False, return_tensors="pt").input_ids[0]
    if len(ids) < 2:
        raise ValueError(f"data: {source} has {len(ids)} tokens; perplexity takes at least two")
    length = min(window, len(ids))
    count = len(ids) // length
    if limit is not None:
        count = min(count, limit)
    return EvaluationText(name, ids[: count * length].view(count, length).to(torch.int64))


def _first(source: str, tokenizer: PreTrainedTokenizerBase, characters: int | None) -> Iterator[str]:
    for document in documents(source):
        text = text_of(document, tokenizer)
        yield text
        if characters is not None:
            characters -= len(text)
            if characters <= 0:
                return


def _from_hub(source: str, published: _Published) -> str:
    try:
        return next(published.read())
    except Exception as error:  # of any library between here and the hub
        reason = printable(f"{type(error).__name__}: {error}", 200)
        raise ValueError(
            f"data: {published.title} cannot be read from the hub ({reason}). Pass text of your own, --data texts.txt, "
            "or leave perplexity out, --no-perplexity"
        ) from error
