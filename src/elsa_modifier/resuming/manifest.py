"""``manifest.json`` of a training checkpoint: its files with their checksums, its tensors, and what is no tensor."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from elsa_sparse.errors import printable
from elsa_sparse.owned import sha256_of

__all__ = ["CheckpointDamaged", "Chunk", "FileEntry", "Manifest", "TensorEntry", "read_verified"]

MANIFEST_FILE = "manifest.json"
_FORMAT = 1


class CheckpointDamaged(ValueError):
    """A training checkpoint that is not what was written; the message names the file."""

    @classmethod
    def of(cls, file: Path, problem: str) -> "CheckpointDamaged":
        """The error with the two in its message."""
        return cls(f"{printable(file)}: {printable(problem, 500)}")


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where it is: in ``file``, under the tensor's name."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class TensorEntry:
    """A whole tensor, which may be in several chunks.

    :param dtype: as torch calls it, without ``torch.``
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class FileEntry:
    """A safetensors file of the checkpoint."""

    size: int
    sha256: str


@dataclass
class Manifest:
    """All that a checkpoint has beside its tensors' values.

    :param run: numbers and names, of JSON's types
    """

    run: dict[str, Any]
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)

    def write(self, directory: Path) -> Path:
        """Write it with a checksum of its own; returns the file."""
        content = json.dumps(asdict(self) | {"format": _FORMAT})
        file = directory / MANIFEST_FILE
        # The content as a string: a checksum is of bytes, and JSON can be written in many ways.
        file.write_text(json.dumps({"sha256": _sha256(content), "content": content}))
        return file

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read it, without looking at the files that it names.

        :raises CheckpointDamaged: if it is missing or not as it was written
        """
        file = directory / MANIFEST_FILE
        try:
            outer = json.loads(file.read_text(encoding="utf-8"))
            content, sha256 = outer["content"], outer["sha256"]
            if _sha256(content) != sha256:
                raise CheckpointDamaged.of(file, "its checksum is wrong")
            inner = json.loads(content)
            if inner["format"] != _FORMAT:
                raise CheckpointDamaged.of(
                    file, f"format {inner['format']} is another version's; this one reads {_FORMAT}"
                )
            tensors = {
                name: TensorEntry(
                    entry["dtype"],
                    tuple(entry["shape"]),
                    tuple(Chunk(tuple(c["offsets"]), tuple(c["sizes"]), c["file"]) for c in entry["chunks"]),
                )
                for name, entry in inner["tensors"].items()
            }
            files = {name: FileEntry(**entry) for name, entry in inner["files"].items()}
            return cls(inner["run"], tensors, files)
        except CheckpointDamaged:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointDamaged.of(file, f"cannot be read ({type(error).__name__}: {error})") from error


def read_verified(directory: Path) -> Manifest:
    """The manifest, once every file that it names has been read and its checksum found right.

    :raises CheckpointDamaged: says which file is not as it was written
    """
    manifest = Manifest.read(directory)

    def check(name: str) -> None:
        file, entry = directory / name, manifest.files[name]
        if Path(name).name != name:
            raise CheckpointDamaged.of(directory, f"names a file outside it, {name!r}")
        try:
            size = file.stat().st_size
            if size != entry.size:
                raise CheckpointDamaged.of(file, f"has {size:,} bytes, and had {entry.size:,} when it was written")
            if sha256_of(file) != entry.sha256:
                raise CheckpointDamaged.of(file, "its checksum is wrong")
        except OSError as error:
            raise CheckpointDamaged.of(file, f"cannot be read ({error.strerror})") from error

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, manifest.files))
    return manifest


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
