"""One way to open a sparse checkpoint, whichever of the two formats it is in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elsa_sparse.checkpoint import CONFIG_FILE, CONFIG_KEY, SparseCheckpoint, read_json
from elsa_sparse.compressed_tensors_bitmask import (
    is_compressed_tensors_bitmask,
    open_compressed_tensors_bitmask,
    without_sparsity,
)

__all__ = ["HINT", "architecture_of", "dense_config", "is_sparse", "open_checkpoint"]

# A config.json may name the file of its weights. transformers refuses what is no such name, and prints it: so a process
# without this package is told what it lacks.
HINT = {
    "transformers_weights": "none, this directory is a sparse checkpoint. Install elsa-modifier and `import "
    "elsa_modifier` before from_pretrained, or write plain safetensors with `elsa unpack`"
}


def is_sparse(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is one of a sparse checkpoint."""
    return CONFIG_KEY in config or is_compressed_tensors_bitmask(config)


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of the same model stored dense."""
    return {key: value for key, value in without_sparsity(config).items() if key not in (CONFIG_KEY, *HINT)}


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The class of the model, if a ``config.json`` names one as transformers writes it."""
    stated = config.get("architectures")
    name = stated[0] if isinstance(stated, list) and stated else None
    # It is looked up, and printed into a model card.
    return name if isinstance(name, str) and name.isidentifier() and len(name) <= 100 else None


def open_checkpoint(directory: str | Path) -> SparseCheckpoint:
    """Open a sparse checkpoint and check its structure; tensors are read one at a time.

    :raises SparseCheckpointError: if it is not one, or files and tables contradict each other
    """
    config = read_json(Path(directory) / CONFIG_FILE)
    if is_compressed_tensors_bitmask(config):
        return open_compressed_tensors_bitmask(directory)
    return SparseCheckpoint.open(directory, config)
