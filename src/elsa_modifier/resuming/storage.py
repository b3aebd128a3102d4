"""Storage of torch.distributed.checkpoint (DCP) in safetensors and JSON.

DCP decides which rank writes and reads which part of which tensor, so that a checkpoint can be read by another number
of ranks. Its own storages do not fit: ``FileSystemReader`` unpickles a file named ``.metadata``, and unpickling runs
whatever code a file holds; ``HuggingFaceStorageWriter`` has no checksums, and holds a rank's tensors in memory
twice. Here a rank writes one safetensors file, tensor after tensor, with its checksum taken on the way, and the
coordinator a manifest. Nothing is unpickled but what ranks of one run send each other.
"""

import hashlib
import json
import os
import struct
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from elsa_modifier.resuming.manifest import CheckpointDamaged, Chunk, FileEntry, Manifest, TensorEntry
from elsa_modifier.training.digest import tensor_bytes

__all__ = ["load_tensors", "save_tensors"]

# Names of safetensors' dtypes.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Said in every call of a single process, for which DCP is meant too. For good: a save may run in a thread of its own,
# and filters that are changed for a while are changed for all threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def save_tensors(
    tensors: Mapping[str, Tensor], directory: Path, run: Mapping[str, Any], group: ProcessGroup | None = None
) -> None:
    """Write a checkpoint. With torch.distributed every rank calls this, with its parts of the tensors.

    :param tensors: by name; a DTensor where a rank has a part of one
    :param directory: where every rank can write; made if it is not there
    :param run: the manifest's; the coordinator's counts
    :param group: of the ranks; None is the default one
    :raises OSError: if one of the ranks cannot write; on all ranks
    """
    try:
        save(dict(tensors), storage_writer=_Writer(directory, run), process_group=group)
    except CheckpointException as error:
        raise _reason(error) from error


def load_tensors(
    tensors: Mapping[str, Tensor], directory: Path, manifest: Manifest, group: ProcessGroup | None = None
) -> None:
    """Read into tensors that are there, in place; each rank its parts of DTensors.

    :param tensors: by name, in the dtype that they were saved in
    :param manifest: of the directory, verified
    :raises CheckpointDamaged: if the checkpoint has no such tensor, or it is of another dtype or shape
    """
    for name, tensor in tensors.items():
        entry = manifest.tensors.get(name)
        wanted = (_dtype_name(tensor.dtype), tuple(tensor.shape))
        if entry is None or (entry.dtype, entry.shape) != wanted:
            there = "is not there" if entry is None else f"is {entry.dtype} {list(entry.shape)}"
            raise CheckpointDamaged.of(directory, f"tensor {name} {there}; needed is {wanted[0]} {list(wanted[1])}")
    try:
        load(dict(tensors), storage_reader=_Reader(directory, manifest), process_group=group)
    except CheckpointException as error:
        raise _reason(error) from error


class _Writer(StorageWriter):
    """One file a rank: its checksum goes to the coordinator with its list of chunks."""

    def __init__(self, directory: Path, run: Mapping[str, Any]) -> None:
        self._directory = directory
        self._run = run
        self._rank = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = int(kwargs.get("rank") or 0)
        self._directory.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        file = self._directory / f"rank-{self._rank:05d}.safetensors"
        written = _write_safetensors(file, plan.items, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, 0, (file.name, written)) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        manifest = Manifest(dict(self._run))
        places: dict[MetadataIndex, str] = {}
        for result in (r for of_rank in results for r in of_rank):
            name, entry = result.storage_data
            manifest.files[name] = entry
            places[result.index] = name
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata), name
            chunks = (
                Chunk(tuple(c.offsets), tuple(c.sizes), places[MetadataIndex(name, c.offsets)]) for c in stored.chunks
            )
            manifest.tensors[name] = TensorEntry(
                _dtype_name(stored.properties.dtype), tuple(stored.size), tuple(chunks)
            )
        _sync(manifest.write(self._directory))
        _sync(self._directory)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _Reader(StorageReader):
    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(getattr(torch, entry.dtype)),
                    torch.Size(entry.shape),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks],
                )
                for name, entry in self._manifest.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with ExitStack() as stack:
            opened: dict[str, Any] = {}
            for item in plan.items:
                name = self._file_of(item)
                if name not in opened:
                    opened[name] = stack.enter_context(safe_open(self._directory / name, framework="pt"))
                self._read(item, opened[name], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, file: Any, planner: LoadPlanner) -> None:
        offsets = item.storage_index.offset
        name = _key(item.storage_index.fqn, [0] * len(item.lengths) if offsets is None else offsets)
        if item.lengths:
            box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            values = file.get_slice(name)[box]
        else:
            values = file.get_tensor(name)
        target = planner.resolve_tensor(item).detach()
        target.copy_(values)
        planner.commit_tensor(item, target)

    def _file_of(self, item: ReadItem) -> str:
        index = item.storage_index
        offsets = None if index.offset is None else tuple(index.offset)
        chunks = self._manifest.tensors[index.fqn].chunks
        return next(c.file for c in chunks if offsets is None or c.offsets == offsets)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _write_safetensors(file: Path, items: Sequence[WriteItem], planner: SavePlanner) -> FileEntry:
    """Write tensor after tensor, none of them in memory twice for longer than it takes, and take the checksum."""
    header: dict[str, Any] = {}
    end = 0
    for item in items:
        assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
        chunk, dtype = item.tensor_data.chunk, item.tensor_data.properties.dtype
        begin, end = end, end + torch.Size(chunk.sizes).numel() * dtype.itemsize
        header[_key(item.index.fqn, chunk.offsets)] = {
            "dtype": _NAMES[dtype],
            "shape": list(chunk.sizes),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as opened:

        def write(part: bytes | memoryview) -> None:
            opened.write(part)
            digest.update(part)

        write(struct.pack("<Q", len(text)))
        write(text)
        for item in items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            write(tensor_bytes(tensor))
        opened.flush()
        os.fsync(opened.fileno())
        size = opened.tell()
    return FileEntry(size, digest.hexdigest())


def _key(name: str, offsets: Sequence[int]) -> str:
    """What a chunk is called in its file: the tensor's name, and where it begins unless that is the tensor's start."""
    return f"{name}@{','.join(map(str, offsets))}" if any(offsets) else name


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reason(error: CheckpointException) -> BaseException:
    """The failure of the first rank that had one, with what it is."""
    failures = [wrapped[0] if isinstance(wrapped, tuple) else wrapped for wrapped in error.failures.values()]
    # An interrupt must not be taken for a full disk.
    failures.sort(key=lambda failure: isinstance(failure, Exception))
    return failures[0] if failures else RuntimeError(str(error))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
