"""Text for a run, from files or the hub: windows of tokens, some of them held out."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, load_dataset
from loguru import logger
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from elsa_sparse.errors import printable

__all__ = ["Texts", "documents", "read_texts"]

_TEXT = {".txt", ".md", ".text"}
_ROWS = {".jsonl", ".ndjson"}
# For the perplexity before and after: of a short text a twentieth, of a long one no more than takes a minute.
_HELD_OUT, _HELD_OUT_FRACTION = 32, 20


class Texts(NamedTuple):
    """What a run trains on, and what it does not.

    :param training: a data set with ``input_ids``, as ``oneshot`` takes it
    :param held_out: (sequences, length) token ids; None if there is too little text
    """

    training: Dataset
    held_out: Tensor | None


def documents(source: str) -> Iterator[str | list[Mapping[str, Any]]]:
    """Documents in order: texts, or the messages of a conversation.

    :param source: a text file, which is one document; a file of JSON lines with ``text`` or ``messages``; a directory
        of such files; or else the name of a data set on the hub, whose ``train`` split has such a column
    :raises ValueError: if it is none of these
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _TEXT | _ROWS and file.is_file())
        if not files:
            raise ValueError(f"data: {source} has no file that ends with {', '.join(sorted(_TEXT | _ROWS))}")
        for file in files:
            yield from documents(str(file))
    elif path.suffix in _ROWS and path.is_file():
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _document(_row(line, path, number), f"{source}, line {number},")
    elif path.is_file():
        yield path.read_text(encoding="utf-8")
    elif path.suffix in _TEXT | _ROWS or source.startswith((".", "/", "~")):
        raise ValueError(f"data: there is no file {source}")
    else:
        for row in _from_hub(source):
            yield _document(row, f"data set {source}")


def read_texts(source: str, tokenizer: PreTrainedTokenizerBase, *, length: int, tokens: int) -> Texts:
    """Documents one after the other, cut into windows; no more of them are read than the run can use.

    :param source: see :func:`documents`
    :param length: tokens of a window
    :param tokens: that the run goes over
    :raises ValueError: if there is less text than two windows
    """
    used = -(-tokens // length)
    wanted = used + _HELD_OUT
    separator = tokenizer.eos_token_id
    stream: list[int] = []
    for document in documents(source):
        text = document if isinstance(document, str) else _conversation(document, tokenizer)
        # Longer than the model takes at a time, which the tokenizer would warn of.
        stream += tokenizer(text, verbose=False)["input_ids"]
        if separator is not None and stream and stream[-1] != separator:
            stream.append(separator)
        if len(stream) >= wanted * length:
            break
    count = min(len(stream) // length, wanted)
    if count < 2:
        raise ValueError(f"data: {source} has {len(stream):,} tokens; a run takes at least {2 * length:,}: pass more")
    windows = torch.tensor(stream[: count * length]).view(count, length)
    # What the run has no use for costs nothing.
    held_out = min(_HELD_OUT, max(count // _HELD_OUT_FRACTION, count - used))
    if not held_out:
        logger.warning(f"{source} has {count} windows of {length} tokens: too few to hold any out to measure on.")
    training = windows[: count - held_out]
    return Texts(Dataset.from_dict({"input_ids": training.tolist()}), windows[count - held_out :] if held_out else None)


def _document(row: Mapping[str, Any], where: str) -> str | list[Mapping[str, Any]]:
    found = row.get("text", row.get("messages"))
    if not isinstance(found, str | list):
        columns = ", ".join(map(printable, row)) or "nothing"
        raise ValueError(f"data: {where} has neither text nor messages, but {columns}")
    return found


def _row(line: str, file: Path, number: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"data: {file}, line {number}, is not JSON ({error})") from error
    return row if isinstance(row, dict) else {}


def _conversation(messages: list[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise ValueError("data: the tokenizer has no chat template to make text of messages; pass rows with text")
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    # The template writes the first token out, and the tokenizer puts it there itself.
    return text.removeprefix(tokenizer.bos_token or "")


def _from_hub(name: str) -> Iterator[Mapping[str, Any]]:
    repository, _, configuration = name.partition(":")
    try:
        yield from load_dataset(repository, configuration or None, split="train", streaming=True)
    except Exception as error:  # of any library between here and the hub
        reason = printable(f"{type(error).__name__}: {error}", 300)
        raise ValueError(
            f"data: {name} is no file or directory here, and no data set that can be read from the hub ({reason}). A "
            "configuration is named after a colon: allenai/c4:en"
        ) from error
