"""What ``save_pretrained`` does beyond transformers and llm-compressor: the history, and the sparse format."""

import os
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from elsa_modifier.fused_experts import FusedLayout, fusing_experts
from elsa_modifier.saved_keys import check_saved_keys
from elsa_sparse.entry import Encoding
from elsa_sparse.writing import DEFAULT_SHARD_SIZE, save_through

__all__ = ["HISTORY_FILE", "extend_save_pretrained"]

HISTORY_FILE = "elsa_history.json"


def extend_save_pretrained(
    model: PreTrainedModel, *, history: str, checkpoint: Encoding, experts: Mapping[str, FusedLayout]
) -> None:
    """Have a model's ``save_pretrained`` also write the history, and pack the result unless it stays dense.

    It raises RuntimeError if the model's class would not find what has been written.

    :param history: content of ``elsa_history.json``
    :param checkpoint: ``dense``, ``coded`` or ``bitmask``
    :param experts: those to put together; see :func:`~elsa_modifier.saved_keys.experts_to_fuse`
    """
    inner = model.save_pretrained

    @wraps(inner)
    def save_pretrained(save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        def save_dense(directory: Path) -> None:
            with fusing_experts(model, experts):
                inner(str(directory), *args, **kwargs)
            check_saved_keys(model, directory)
            partial = directory / f".{HISTORY_FILE}.partial"
            partial.write_text(history)
            partial.replace(directory / HISTORY_FILE)

        if checkpoint == "dense":
            save_dense(Path(save_directory))
            return
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub would upload the dense model; save it, then upload the directory")
        save_through(
            save_dense,
            Path(save_directory),
            encoding=checkpoint,
            max_shard_size=kwargs.get("max_shard_size", DEFAULT_SHARD_SIZE),
            overwrite=True,
        )

    model.save_pretrained = save_pretrained
