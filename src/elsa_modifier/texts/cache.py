"""Where tokens are kept between runs, and under what name: that of the text, the tokenizer and the length together."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from elsa_modifier.texts.documents import files_of

__all__ = ["CACHE_VARIABLE", "cache_directory", "key_of"]

CACHE_VARIABLE = "ELSA_CACHE"
# Of the way from a text to its tokens; whoever changes that way counts on.
_WAY = 1


def cache_directory() -> Path | None:
    """``$ELSA_CACHE``, or else ``~/.cache/elsa-modifier``; None, and nothing is kept, if the variable is empty."""
    given = os.environ.get(CACHE_VARIABLE)
    if given is not None:
        return Path(given).expanduser() if given else None
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "elsa-modifier"


def key_of(source: str, tokenizer: PreTrainedTokenizerBase, *, length: int) -> str | None:
    """What tells the tokens of a source from all others, in hexadecimal digits.

    For files that is their content and the order of their names, for a data set on the hub its commit; None if that
    cannot be asked for.

    :param source: see :func:`~elsa_modifier.texts.documents.documents`
    :raises ValueError: if it is none
    """
    files = files_of(source)
    if files is None:
        parts: Any = _commit(source)
        if parts is None:
            return None
    else:
        # The suffix says how a file is read.
        parts = [[file.suffix, _sha256(file)] for file in files]
    described = json.dumps([_WAY, parts, _tokenizer(tokenizer), length])
    return hashlib.sha256(described.encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        # hashlib.file_digest, which Python 3.10 has not.
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        tables = json.loads(backend.to_str())
        # Calls set them anew.
        tables.pop("truncation", None)
        tables.pop("padding", None)
        rules = json.dumps(tables, sort_keys=True)
    else:
        rules = json.dumps([tokenizer.get_vocab(), repr(tokenizer)], sort_keys=True)
    template = tokenizer.chat_template
    return [
        type(tokenizer).__name__,
        hashlib.sha256(rules.encode()).hexdigest(),
        tokenizer.eos_token_id,
        tokenizer.bos_token,
        template if isinstance(template, str | None) else json.dumps(template, sort_keys=True),
    ]


def _commit(source: str) -> list[str] | None:
    from huggingface_hub import HfApi

    repository, _, configuration = source.partition(":")
    try:
        commit = HfApi().dataset_info(repository).sha
    except Exception:  # of any library between here and the hub; whoever reads it will say so
        return None
    return [repository, configuration, commit] if commit else None
