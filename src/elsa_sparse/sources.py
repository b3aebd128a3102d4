"""The directory that a checkpoint is read from: what in it travels along, and whether it stays the same meanwhile."""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elsa_sparse.checkpoint import CONFIG_FILE
from elsa_sparse.errors import SparseCheckpointError, printable
from elsa_sparse.files import open_regular
from elsa_sparse.model_card import CARD_FILE, is_reported

__all__ = ["BENCH_FILE", "EVALUATION_FILE", "companions", "copy_companions", "forget_findings", "unchanged"]

# What has been found about a checkpoint does not travel, and goes when another checkpoint comes; nor does a model card
# that says it.
EVALUATION_FILE = "elsa_eval.json"
BENCH_FILE = "elsa_bench.json"

# Weights of any format, which do not travel along.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")


def companions(source: Path, target: Path) -> list[str]:
    """Names of the files in a checkpoint that are neither weights nor what this package writes, relative to it.

    :param target: a directory that is none of them, though it may lie within
    """
    return [
        name
        for name in _files(source, target)
        if name not in (CONFIG_FILE, EVALUATION_FILE, BENCH_FILE)
        and not _is_weights(name)
        and (source / name).is_file()
        and not (name == CARD_FILE and is_reported(source / name))
    ]


def forget_findings(directory: Path) -> None:
    """Delete what was found about the checkpoint that was there before, and the model card that says so."""
    for name in (EVALUATION_FILE, BENCH_FILE):
        (directory / name).unlink(missing_ok=True)
    if is_reported(directory / CARD_FILE):
        (directory / CARD_FILE).unlink()


def copy_companions(source: Path, target: Path, copies: Path) -> None:
    """Copy companions; links as what they lead to. Pipes, devices and sockets are left out with a warning.

    :param target: as of :func:`companions`
    :param copies: the directory they are copied to
    :raises OSError: if a file cannot be copied
    :raises SparseCheckpointError: if one cannot be opened
    """
    for name in _files(source, target):
        if not (source / name).is_file():
            said = f"{printable(source / name)} is not copied: it is neither a file nor a directory"
            warnings.warn(said, stacklevel=3)
    for name in companions(source, target):
        size, free = (source / name).stat().st_size, shutil.disk_usage(copies).free
        if size > free:
            raise OSError(f"{source / name} has {size:,} bytes, and {free:,} are free in {copies}")
        (copies / name).parent.mkdir(parents=True, exist_ok=True)
        with open_regular(source / name) as stream, open(copies / name, "wb") as copy:
            shutil.copyfileobj(stream, copy)
        shutil.copystat(source / name, copies / name)


@contextmanager
def unchanged(source: Path, target: Path) -> Iterator[None]:
    """Refuse what a block has read from a directory if it changed under it.

    :raises SparseCheckpointError: at the end, if a file has come, gone, or been written to
    """
    before = _states(source, target)
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    after = _states(source, target)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise SparseCheckpointError(
            "was changed while it was read; try again when nobody writes it", file=source / changed[0]
        ) from failure
    if failure is not None:
        raise failure


def _states(source: Path, target: Path) -> dict[str, tuple[int, ...]]:
    """What changes with a file's content, by name: the time of the last change of its status cannot be set back."""
    states: dict[str, tuple[int, ...]] = {}
    for name in _files(source, target):
        try:
            found = (source / name).stat()
        except FileNotFoundError:  # a link to nothing
            continue
        states[name] = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return states


def _files(source: Path, target: Path) -> Iterator[str]:
    """Names of all files, but hidden ones at the top."""
    if not source.is_dir():
        return
    inside = os.path.realpath(target)
    for directory, subdirectories, files in os.walk(source, followlinks=True):
        at_top = Path(directory) == source
        for name in sorted(files):
            if not (at_top and name.startswith(".")):
                yield (Path(directory) / name).relative_to(source).as_posix()
        here = Path(os.path.realpath(directory))
        subdirectories[:] = [
            name
            for name in sorted(subdirectories)
            if not (at_top and name.startswith("."))
            and os.path.realpath(here / name) != inside
            and not here.is_relative_to(os.path.realpath(here / name))  # a link upwards
        ]


def _is_weights(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in _WEIGHTS)
