"""Reading a sparse checkpoint: a directory of safetensors shards whose ``config.json`` says how tensors are stored.

::

    config.json                                                 the model's, with one more key, see :mod:`table`
    sparse-model-0123456789abcdef-00001-of-00002.safetensors    parts of tensors

The shards are not called ``model-...`` on purpose: whatever does not know the format then fails to find a model,
instead of initializing one at random.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from elsa_sparse.entry import TensorEntry, check_sizes, decode
from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.files import read_json
from elsa_sparse.headers import PartHeader, read_header
from elsa_sparse.table import CONFIG_FILE, CONFIG_KEY, FORMAT_VERSION, INDEX_FILE, Table, read_table

__all__ = [
    "CONFIG_FILE",
    "CONFIG_KEY",
    "FORMAT_VERSION",
    "INDEX_FILE",
    "Shards",
    "SparseCheckpoint",
    "read_json",
    "read_weight_map",
]


def read_weight_map(index_file: Path) -> dict[str, str]:
    """File of every tensor, by name, of a safetensors index.

    :raises SparseCheckpointError: if the file is missing or is not an index
    """
    return _weight_map(read_json(index_file), index_file)


def _weight_map(index: dict[str, Any], index_file: Path) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise SparseCheckpointError("weight_map is not a mapping of names to files", file=index_file)
    return weight_map


class Shards:
    """The safetensors files of a checkpoint, opened; their parts by name. Closed at the end of a ``with`` block.

    :raises SparseCheckpointError: if a file is missing or is not a safetensors file
    """

    def __init__(self, directory: Path, files: list[str]) -> None:
        self.directory = directory
        self._open: dict[str, Any] = {}
        self._headers: dict[str, PartHeader] = {}
        self.file_of: dict[str, str] = {}
        try:
            self._open_all(files)
        except BaseException:
            self.close()
            raise

    def _open_all(self, files: list[str]) -> None:
        for file in files:
            path = self.directory / file
            if Path(file).name != file:
                raise SparseCheckpointError("there is no such file in the checkpoint", file=path)
            header = read_header(path)
            try:
                shard: Any = safe_open(path, framework="pt")
                shard.__enter__()
            except (SafetensorError, OSError, MemoryError) as error:
                raise SparseCheckpointError(f"is truncated or not a safetensors file: {error}", file=path) from error
            self._open[file] = shard
            for part in shard.keys():  # noqa: SIM118  (not a mapping)
                if part in self.file_of:
                    raise SparseCheckpointError(f"{part} is also in {self.file_of[part]}", file=path)
                self.file_of[part] = file
            self._headers |= header

    def read(self, part: str) -> Tensor:
        """One part, from disk."""
        file = self.file_of[part]
        try:
            tensor: Tensor = self._open[file].get_tensor(part)
        except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
            raise SparseCheckpointError(f"{part} cannot be read: {error}", file=self.directory / file) from error
        return tensor

    @property
    def files(self) -> list[str]:
        """Names of the files."""
        return list(self._open)

    def metadata(self, file: str) -> dict[str, str] | None:
        """What a file's header says beside its parts."""
        metadata: dict[str, str] | None = self._open[file].metadata()
        return metadata

    def describe(self, part: str) -> PartHeader:
        """A part's dtype and shape, from the header."""
        return self._headers[part]

    def bytes_of(self, part: str) -> int:
        """Size of a part."""
        return self._headers[part].bytes

    def close(self) -> None:
        for shard in self._open.values():
            shard.__exit__(None, None, None)
        self._open.clear()


class SparseCheckpoint:
    """A sparse checkpoint, opened and its structure checked; tensors are read, verified and rebuilt one at a time.

    :param config: ``config.json``, as it is
    :param entries: what is known of each tensor, by name, in the order of the files
    """

    def __init__(self, config: dict[str, Any], entries: dict[str, TensorEntry], shards: Shards) -> None:
        self.config = config
        self.entries = entries
        self._shards = shards

    @classmethod
    def open(cls, directory: str | Path, config: dict[str, Any] | None = None) -> "SparseCheckpoint":
        """Open a directory and compare table, index and headers; reads no weights.

        :param config: the content of ``config.json`` if it is not in the directory
        :raises SparseCheckpointError: if anything is missing, left over, or contradicts anything else
        """
        directory = Path(directory)
        config_file = directory / CONFIG_FILE
        config = read_json(config_file) if config is None else config
        table = read_table(config, config_file)
        if table.version == 1:
            index = read_json(directory / INDEX_FILE)
            weight_map = _weight_map(index, directory / INDEX_FILE)
            shards = Shards(directory, sorted(set(weight_map.values())))
        else:
            shards = Shards(directory, table.shards)
        try:
            if table.version == 1:
                _check_index(shards, index)
            order = _check_parts(shards, table)
            _check_sizes(shards, table.entries)
        except BaseException:
            shards.close()
            raise
        return cls(config, {name: table.entries[name] for name in order}, shards)

    def file_of(self, name: str) -> Path:
        """The shard that holds a tensor."""
        return self._shards.directory / self._shards.file_of[next(iter(self.entries[name].parts.values()))]

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor's parts in its file, without their header."""
        return sum(self._shards.bytes_of(part) for part in self.entries[name].parts.values())

    def read(self, name: str) -> Tensor:
        """A dense tensor, on the CPU.

        :raises SparseCheckpointError: if its parts are not what they should be
        """
        entry = self.entries[name]
        parts = {part: self._shards.read(stored) for part, stored in entry.parts.items()}
        try:
            return decode(entry, parts)
        except SparseCheckpointError as error:
            raise SparseCheckpointError(str(error), file=self.file_of(name)) from error

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and dense tensors, in the order of the files."""
        for name in self.entries:
            yield name, self.read(name)

    def verify(self) -> None:
        """Read everything.

        :raises SparseCheckpointError: at the first tensor that is not what it should be
        """
        for name in self.entries:
            self.read(name)

    def close(self) -> None:
        """Close the files."""
        self._shards.close()

    def __enter__(self) -> "SparseCheckpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _check_index(shards: Shards, index: dict[str, Any]) -> None:
    """The index of version 1 against the headers."""
    index_file = shards.directory / INDEX_FILE
    weight_map = index["weight_map"]
    for part in weight_map.keys() | shards.file_of.keys():
        stated, found = weight_map.get(part), shards.file_of.get(part)
        if stated != found:
            raise SparseCheckpointError(
                f"says that {stated or 'no file'} holds {part}; it is in {found or 'none'}", file=index_file
            )
    total = sum(shards.bytes_of(part) for part in shards.file_of)
    metadata = {"total_size": total}
    if index != {"metadata": metadata, "weight_map": weight_map} or type(index["metadata"]["total_size"]) is not int:
        raise SparseCheckpointError(f"metadata has to be a total_size of {total}", file=index_file)


def _check_parts(shards: Shards, table: Table) -> list[str]:
    """The table against the headers. Names of the tensors in the order of their files."""
    config_file = shards.directory / CONFIG_FILE
    owner: dict[str, str] = {}
    for name, entry in table.entries.items():
        for part in entry.parts.values():
            found = shards.file_of.get(part)
            if found is None:
                raise SparseCheckpointError(f"{part} is missing", file=config_file, tensor=name)
            if part in owner:
                raise SparseCheckpointError(f"{part} is also a part of {owner[part]}", file=config_file)
            if table.version > 1 and found != table.shards[table.shard_of[name]]:
                raise SparseCheckpointError(
                    f"says that {table.shards[table.shard_of[name]]} holds {part}; it is in {found}", file=config_file
                )
            owner[part] = name
    for part, file in shards.file_of.items():
        if part not in owner:
            raise SparseCheckpointError(f"{part} belongs to no tensor in config.json", file=shards.directory / file)
    for file in shards.files:
        if shards.metadata(file) != {"format": "pt"}:
            raise SparseCheckpointError('its header\'s metadata is not {"format": "pt"}', file=shards.directory / file)
    return list(dict.fromkeys(owner[part] for part in shards.file_of))


def _check_sizes(shards: Shards, entries: dict[str, TensorEntry]) -> None:
    try:
        for entry in entries.values():
            check_sizes(entry, sum(shards.bytes_of(part) for part in entry.parts.values()))
    except SparseCheckpointError as error:
        raise SparseCheckpointError(str(error), file=shards.directory / CONFIG_FILE) from error
