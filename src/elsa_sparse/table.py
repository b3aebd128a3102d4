"""The key ``elsa_sparse`` of a ``config.json``: which files make up a checkpoint, and how each tensor is stored.

::

    "elsa_sparse": {
      "version": 2,
      "files": {"sparse-model-0123456789abcdef-00001-of-00002.safetensors": sha256, "README.md": sha256, ...},
      "tensors": {"model...q_proj.weight": {"shard": 1, encoding, dtype, shape, ...}, ...}
    }

``files`` are those that were written with this ``config.json``, and may be deleted when another takes its place. The
shards' names carry a digest of it, so that files of two checkpoints never have one name. Version 1 had shards of fixed
names, an index file that said which part lies in which, and no ``files``.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from elsa_sparse.entry import TensorEntry
from elsa_sparse.errors import SparseCheckpointError

__all__ = [
    "CONFIG_FILE",
    "CONFIG_KEY",
    "FORMAT_VERSION",
    "INDEX_FILE",
    "Table",
    "read_table",
    "shard_names",
    "table_as_json",
]

CONFIG_FILE = "config.json"
CONFIG_KEY = "elsa_sparse"
FORMAT_VERSION = 2
INDEX_FILE = "sparse-model.safetensors.index.json"
"""Of version 1."""

_SHARD = re.compile(r"sparse-model-[0-9a-f]{16}-\d{5,}-of-\d{5,}\.safetensors")


@dataclass(frozen=True)
class Table:
    """What ``config.json`` says of a checkpoint.

    :param version: 1 or 2
    :param files: SHA-256, in hexadecimal, of every file that was written with it but ``config.json`` itself, by name
        relative to the directory; empty in version 1
    :param shards: those of them that hold tensors, in order
    :param entries: of every tensor, by name
    :param shard_of: index in ``shards`` of each tensor's, by the tensor's name; empty in version 1
    """

    version: int
    files: dict[str, str]
    shards: list[str]
    entries: dict[str, TensorEntry]
    shard_of: dict[str, int]


def shard_names(shards: list[str], others: Mapping[str, str]) -> list[str]:
    """Names of a checkpoint's shards, which no other checkpoint has.

    :param shards: SHA-256 of each, in order
    :param others: the other files' SHA-256, by name
    """
    identity = hashlib.sha256(json.dumps([shards, dict(others)], sort_keys=True).encode()).hexdigest()[:16]
    count = len(shards)
    return [f"sparse-model-{identity}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def table_as_json(files: Mapping[str, str], entries: Iterable[tuple[TensorEntry, int]]) -> str:
    """The value of the key, as :func:`read_table` reads it, with one line a tensor.

    :param files: SHA-256 by name, of shards and others
    :param entries: with the index of the shard that holds the tensor
    """
    blocks = {
        "files": [f"{json.dumps(name)}: {json.dumps(sha256)}" for name, sha256 in sorted(files.items())],
        "tensors": [f"{json.dumps(e.name)}: {json.dumps({'shard': i + 1} | e.to_json())}" for e, i in entries],
    }
    texts = [f'"version": {FORMAT_VERSION}']
    for key, lines in blocks.items():
        texts.append(f'"{key}": {{\n      ' + ",\n      ".join(lines) + "\n    }")
    return "{\n    " + ",\n    ".join(texts) + "\n  }"


def read_table(config: Mapping[str, Any], file: Path) -> Table:
    """The table in a ``config.json``.

    :param file: where it comes from, for messages
    :raises SparseCheckpointError: if there is none, or it is not what a table may be
    """
    if CONFIG_KEY not in config:
        raise SparseCheckpointError(f"has no {CONFIG_KEY!r}: this is not a sparse checkpoint", file=file)
    stated = config[CONFIG_KEY]
    version = stated.get("version") if isinstance(stated, dict) else None
    if version not in (1, FORMAT_VERSION) or type(version) is not int:
        raise SparseCheckpointError(
            f"{CONFIG_KEY}.version is {version!r:.80}; this version of elsa-modifier reads 1 and {FORMAT_VERSION}",
            file=file,
        )
    keys = {"version", "tensors"} | ({"files"} if version > 1 else set())
    if stated.keys() != keys or not isinstance(stated["tensors"], dict):
        raise SparseCheckpointError(f"{CONFIG_KEY} has to hold {', '.join(sorted(keys))}, and nothing else", file=file)
    tensors = {name: dict(data) if isinstance(data, dict) else data for name, data in stated["tensors"].items()}
    try:
        files = _read_files(stated["files"]) if version > 1 else {}
        shards = sorted(name for name in files if _SHARD.fullmatch(name))
        shard_of = {name: _take_shard(name, data, len(shards)) for name, data in tensors.items()} if version > 1 else {}
        entries = {name: TensorEntry.from_json(name, data) for name, data in tensors.items()}
    except SparseCheckpointError as error:
        raise SparseCheckpointError(str(error), file=file) from error
    return Table(version, files, shards, entries, shard_of)


def _read_files(stated: Any) -> dict[str, str]:
    if not isinstance(stated, dict) or not all(map(_is_file_of_ours, stated.items())):
        raise SparseCheckpointError(f"{CONFIG_KEY}.files is not a mapping of names in the directory to SHA-256")
    shards = sorted(name for name in stated if _SHARD.fullmatch(name))
    others = {name: sha256 for name, sha256 in stated.items() if name not in shards}
    if shards != shard_names([stated[name] for name in shards], others):
        raise SparseCheckpointError(f"{CONFIG_KEY}.files has been altered: the shards' names do not agree with it")
    return dict(stated)


def _is_file_of_ours(item: tuple[str, Any]) -> bool:
    """Whether it is a file in the directory; the table may name what will be deleted, so nothing may lead out of it."""
    name, sha256 = item
    path = PurePosixPath(name)
    inside = bool(name) and not path.is_absolute() and ".." not in path.parts and str(path) == name
    is_hash = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) is not None
    return inside and "\0" not in name and name not in (".", CONFIG_FILE) and is_hash


def _take_shard(name: str, data: Any, count: int) -> int:
    """Index of a tensor's shard, taken out of its entry."""
    number = data.pop("shard", None) if isinstance(data, dict) else 1
    if type(number) is not int or not 1 <= number <= max(1, count):
        raise SparseCheckpointError(f"shard is {number!r:.80}; allowed is 1 to {count}", tensor=name)
    return number - 1
