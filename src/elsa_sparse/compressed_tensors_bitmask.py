"""Reading the ``sparse-bitmask`` checkpoints that compressed-tensors wrote up to 0.14.

They have no table and no checksums: what is known of a tensor is what its parts say. Later versions left ``.weight``
out of the parts' names.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from elsa_sparse.bitmask import PARTS
from elsa_sparse.checkpoint import CONFIG_FILE, Shards, SparseCheckpoint, read_json, read_weight_map
from elsa_sparse.entry import TensorEntry, sparsity_of
from elsa_sparse.errors import SparseCheckpointError

__all__ = ["is_compressed_tensors_bitmask", "open_compressed_tensors_bitmask", "without_sparsity"]

_FORMAT = "sparse-bitmask"
_HOLDERS = ("quantization_config", "compression_config")


def is_compressed_tensors_bitmask(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is one of such a checkpoint."""
    return any(_sparsity_config(config.get(holder)).get("format") == _FORMAT for holder in _HOLDERS)


def _sparsity_config(holder: Any) -> Mapping[str, Any]:
    stated = holder.get("sparsity_config") if isinstance(holder, dict) else None
    return stated if isinstance(stated, dict) else {}


def without_sparsity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of the same model with dense tensors: what it says of quantization, if anything, stays."""
    dense = dict(config)
    for holder in _HOLDERS:
        if _sparsity_config(config.get(holder)).get("format") == _FORMAT:
            rest = {k: v for k, v in config[holder].items() if k != "sparsity_config"}
            if rest.get("config_groups"):
                dense[holder] = rest
            else:
                del dense[holder]
    return dense


def open_compressed_tensors_bitmask(directory: str | Path) -> SparseCheckpoint:
    """Open such a directory; a tensor's parts are checked against each other when it is read.

    :raises SparseCheckpointError: if files or parts are missing
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG_FILE)
    index_file = directory / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index_file.exists():
        files = set(read_weight_map(index_file).values())
    shards = Shards(directory, sorted(files))
    try:
        entries = _entries(shards)
    except BaseException:
        shards.close()
        raise
    return SparseCheckpoint(config, entries, shards)


def _entries(shards: Shards) -> dict[str, TensorEntry]:
    entries = {}
    for part in shards.file_of:
        prefix, _, suffix = part.rpartition(".")
        if suffix in PARTS and f"{prefix}.bitmask" in shards.file_of:
            name = prefix if prefix.endswith(".weight") else f"{prefix}.weight"
            if name not in entries:
                entries[name] = _bitmask_entry(shards, name, prefix)
        else:
            dtype, shape = shards.describe(part)
            entries[part] = TensorEntry(
                name=part,
                encoding="dense",
                dtype=str(dtype).removeprefix("torch."),
                shape=tuple(shape),
                sparsity=sparsity_of(shards.read(part)),
            )
    return entries


def _bitmask_entry(shards: Shards, name: str, prefix: str) -> TensorEntry:
    file = shards.directory / shards.file_of[f"{prefix}.bitmask"]
    missing = [suffix for suffix in PARTS if f"{prefix}.{suffix}" not in shards.file_of]
    if missing:
        raise SparseCheckpointError(f"{prefix}.{missing[0]} is missing", file=file, tensor=name)
    stated = shards.describe(f"{prefix}.shape")
    if stated.dtype != torch.int64 or len(stated.shape) != 1 or not 1 <= stated.shape[0] <= 16:
        raise SparseCheckpointError(f"{prefix}.shape is not a list of 1 to 16 dimensions", file=file, tensor=name)
    shape = tuple(shards.read(f"{prefix}.shape").tolist())
    width = (math.prod(shape[:-1]), -(-shape[-1] // 8))
    if min(shape) < 0 or shards.describe(f"{prefix}.bitmask").shape != width:
        raise SparseCheckpointError(f"shape {shape} needs a bitmask of {width}", file=file, tensor=name)
    dtype, values = shards.describe(f"{prefix}.compressed")
    return TensorEntry(
        name=name,
        encoding="bitmask",
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        sparsity=max(0.0, 1 - values.numel() / max(1, math.prod(shape))),
        prefix=prefix,
    )
