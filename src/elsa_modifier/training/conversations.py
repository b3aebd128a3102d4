"""Conversations: rows whose ``messages`` are to become text by the tokenizer's chat template.

llm-compressor does so for the datasets that it knows by name. Of any other it drops columns that a tokenizer does not
take, and what is left of rows of messages is nothing. Its class for such datasets has a place for a template, empty.
"""

from collections.abc import Callable, Mapping
from typing import Any

from llmcompressor.transformers.data.base import get_columns
from llmcompressor.transformers.data.custom import CustomDataset

__all__ = ["teach_chat_templates"]


def teach_chat_templates() -> None:
    """From now on ``oneshot`` takes datasets with a ``messages`` column, unless llm-compressor has come to do so."""
    if "dataset_template" not in vars(CustomDataset):
        CustomDataset.dataset_template = property(_template)


def _template(dataset: CustomDataset) -> Callable[[Mapping[str, Any]], dict[str, str]] | None:
    given, arguments = dataset.dataset_args.dataset, dataset.dataset_args
    # Streams may not know their columns.
    columns = get_columns(given) if getattr(given, "column_names", None) else ()
    if "messages" not in columns or {"text", arguments.text_column} & set(columns):
        return None
    tokenizer = dataset.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"the dataset has columns {sorted(columns)}, and the tokenizer no chat template that would make text of "
            "messages: pass a tokenizer with one to oneshot, or a dataset with a column 'text'"
        )
    first = tokenizer.bos_token
    # The template writes the first token out, and so would the tokenizer put it there a second time.
    doubled = first is not None and tokenizer(first)["input_ids"][:2] == [tokenizer.bos_token_id] * 2

    def text(row: Mapping[str, Any]) -> dict[str, str]:
        written: str = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        return {"text": written.removeprefix(first) if doubled else written}

    return text
