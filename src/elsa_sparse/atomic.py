"""Writing a directory so that it appears at once, complete, or not at all."""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replaced_directory"]

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replaced_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty directory beside ``target`` that takes its place when the block ends without an error.

    Until then ``target``, if it exists, is what it was; killed at any moment, it is the old or the new one. What was in
    the old one beside weights and files of the new one's names stays. The directory is called ``.<target>.partial``;
    one that a killed process left behind is cleared by the next that writes the same target.

    :param target: need not exist; its parent is made
    :param overwrite: allow that it exists and is not empty
    :raises FileExistsError: if it does and may not, is no directory, or another process is writing it
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; name a directory")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and is not empty; name another directory, or allow overwriting it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial"
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            # The lock ends with the process, however that ends.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FileExistsError(f"another process is writing {target}") from error
        _clear(partial)
        try:
            yield partial
            _sync(partial)
            _publish(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(handle)


def _publish(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
    elif not any(target.iterdir()):
        os.replace(partial, target)
    else:
        _exchange(partial, target)
        # ``partial`` is the old one now.
        for old in partial.iterdir():
            if not any(old.match(pattern) for pattern in _WEIGHTS) and not (target / old.name).exists():
                old.rename(target / old.name)
    _sync_one(target.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories, in one step where the system can (Linux), else in three."""
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        failed = library.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
        if not failed:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(one), None, str(other))
    previous = other.with_name(f".{other.name}.previous")
    other.rename(previous)
    one.rename(other)
    previous.rename(one)


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(directory: Path) -> None:
    """Have everything on disk before it counts, so that a power cut leaves no empty file under a final name."""
    for path in directory.rglob("*"):
        _sync_one(path)
    _sync_one(directory)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
