"""Which files in a directory are this package's own, so that nothing else is ever replaced or deleted."""

import hashlib
import stat
from pathlib import Path

from elsa_sparse.checkpoint import SparseCheckpoint, read_json
from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.table import CONFIG_FILE, INDEX_FILE, read_table

__all__ = ["is_plain_file", "owned_files", "remove_owned", "sha256_of", "still_is"]


def owned_files(directory: Path) -> dict[str, str] | None:
    """SHA-256 by name of what was written here with the sparse ``config.json`` that lies here, and may be replaced.

    :returns: without ``config.json``, which is owned too; None if there is none that this package wrote
    """
    if not is_plain_file(directory, CONFIG_FILE):
        return None
    try:
        config = read_json(directory / CONFIG_FILE)
        table = read_table(config, directory / CONFIG_FILE)
        if table.version > 1:
            return table.files
        # Version 1 has no list of files. Those of its index hold what it says they do, or else they are not owned.
        with SparseCheckpoint.open(directory, config) as checkpoint:
            checkpoint.verify()
            names = {checkpoint.file_of(name).name for name in checkpoint.entries} | {INDEX_FILE}
    except SparseCheckpointError:
        return None
    return {name: sha256_of(directory / name) for name in names if is_plain_file(directory, name)}


def is_plain_file(directory: Path, name: str) -> bool:
    """Whether it is a file in the directory, and not reached through a link."""
    parents = [parent for parent in Path(name).parents if parent.name]
    try:
        return stat.S_ISREG((directory / name).lstat().st_mode) and all(
            stat.S_ISDIR((directory / parent).lstat().st_mode) for parent in parents
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


def still_is(directory: Path, name: str, sha256: str | None) -> bool:
    """Whether a file is there, and what it was when it had this SHA-256."""
    return sha256 is not None and is_plain_file(directory, name) and sha256_of(directory / name) == sha256


def remove_owned(directory: Path, name: str, sha256: str | None) -> None:
    """Delete a file if it is still what was written, and directories that are empty without it."""
    if not still_is(directory, name, sha256):
        return
    (directory / name).unlink()
    for parent in Path(name).parents:
        if parent.name:
            try:
                (directory / parent).rmdir()
            except OSError:  # holds something else
                break


def sha256_of(file: Path) -> str:
    """In hexadecimal."""
    state = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()
