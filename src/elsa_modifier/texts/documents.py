"""Documents, one after the other, from files or the hub; never more of them in memory than a part of one."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import PreTrainedTokenizerBase

from elsa_sparse.errors import printable

__all__ = ["documents", "files_of", "text_of"]

Messages = list[Mapping[str, Any]]

_TEXT = {".txt", ".md", ".text"}
_ROWS = {".jsonl", ".ndjson"}
# Characters of a text file that are one document; a longer file is several, cut where a line ends.
_PART = 2**24


def files_of(source: str) -> list[Path] | None:
    """The files that a source is, in the order in which they are read; None if it is a data set on the hub.

    :raises ValueError: if it is a directory without such files, or looks like a file that does not exist
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _TEXT | _ROWS and file.is_file())
        if not files:
            raise ValueError(f"data: {source} has no file that ends with {', '.join(sorted(_TEXT | _ROWS))}")
        return files
    if path.is_file():
        return [path]
    if path.suffix in _TEXT | _ROWS or source.startswith((".", "/", "~")):
        raise ValueError(f"data: there is no file {source}")
    return None


def documents(source: str) -> Iterator[str | Messages]:
    """Documents in order: texts, or the messages of a conversation.

    :param source: a text file, which is one document, or several of 16 million characters; a file of JSON lines with
        ``text`` or ``messages``; a directory of such files; or else the name of a data set on the hub, whose ``train``
        split has such a column
    :raises ValueError: if it is none of these
    """
    files = files_of(source)
    if files is None:
        for row in _from_hub(source):
            yield _document(row, f"data set {source}")
        return
    for file in files:
        if file.suffix in _ROWS:
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _document(_row(line, file, number), f"{file}, line {number},")
        else:
            yield from _parts(file)


def text_of(document: str | Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """A document as text: messages by the tokenizer's chat template.

    :raises ValueError: if the tokenizer has none
    """
    if isinstance(document, str):
        return document
    if tokenizer.chat_template is None:
        raise ValueError("data: the tokenizer has no chat template to make text of messages; pass rows with text")
    text: str = tokenizer.apply_chat_template(document, tokenize=False)
    # The template writes the first token out, and the tokenizer puts it there itself.
    return text.removeprefix(tokenizer.bos_token or "")


def _parts(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as stream:
            while text := stream.read(_PART):
                yield text + (stream.readline() if len(text) == _PART else "")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {file} is not text in UTF-8 ({error.reason} at byte {error.start:,})") from error


def _document(row: Mapping[str, Any], where: str) -> str | Messages:
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
