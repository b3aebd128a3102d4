"""What lies beside a checkpoint's weights and travels along: tokenizer, recipe, model card, code."""

import os
import shutil
import stat
import warnings
from pathlib import Path

from elsa_sparse.errors import printable
from elsa_sparse.files import open_regular

__all__ = ["copy_companions"]

# Weights of any format, which do not travel along.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")


def copy_companions(source: Path, target: Path, *, leave: frozenset[str]) -> None:
    """Copy the regular files of a directory and of those in it, but for weights and hidden ones.

    Links to files are copied as files. Links to directories, pipes, devices and sockets are left out with a warning.

    :param target: an existing directory, which may lie in ``source``
    :param leave: names of files in ``source`` itself that are left out
    :raises OSError: if a file cannot be copied
    :raises SparseCheckpointError: if one cannot be opened
    """
    for path in sorted(source.iterdir()):
        if path.name not in leave:
            _copy(path, target / path.name, outside=os.stat(target))


def _copy(path: Path, copy: Path, *, outside: os.stat_result) -> None:
    if path.name.startswith(".") or any(path.match(pattern) for pattern in _WEIGHTS):
        return
    kind = path.lstat().st_mode
    if stat.S_ISDIR(kind):
        if os.path.samestat(path.lstat(), outside):
            return
        copy.mkdir(exist_ok=True)
        for inner in sorted(path.iterdir()):
            _copy(inner, copy / inner.name, outside=outside)
    elif path.is_file():
        size, free = path.stat().st_size, shutil.disk_usage(copy.parent).free
        if size > free:
            raise OSError(f"{path} has {size:,} bytes, and {free:,} are free in {copy.parent}")
        with open_regular(path) as stream, open(copy, "wb") as written:
            shutil.copyfileobj(stream, written)
        shutil.copystat(path, copy)
    else:
        warnings.warn(f"{printable(path)} is not copied: it is neither a file nor a directory", stacklevel=4)
