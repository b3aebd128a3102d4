"""Opening files that others wrote: regular ones only, no larger than they may be, and JSON that says one thing."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from elsa_sparse.errors import SparseCheckpointError, printable

__all__ = ["MAX_JSON_BYTES", "open_regular", "parse_json", "read_bounded", "read_json"]

# A table of 300,000 tensors takes about as much.
MAX_JSON_BYTES = 128 * 10**6
# More than any file needs, and few enough for whatever walks through what was read.
_MAX_DEPTH = 100
_MAX_DIGITS = 40

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(file: Path) -> BinaryIO:
    """A file opened for reading, if it is a regular one or a link to one; never waits for anybody.

    :raises SparseCheckpointError: if it is missing, cannot be opened, or is a pipe, a device, a socket or a directory
    """
    try:
        # Asked twice: opening a device may set it going, and what is opened may be another file by then.
        _check_kind(os.stat(file).st_mode, file)
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SparseCheckpointError("there is no such file: the checkpoint is not complete", file=file) from error
    except OSError as error:
        raise SparseCheckpointError(f"cannot be opened: {error.strerror}", file=file) from error
    except SparseCheckpointError:
        raise
    except ValueError as error:  # a zero byte in the name
        raise SparseCheckpointError(f"cannot be opened: {error}", file=file) from error
    stream = os.fdopen(handle, "rb")
    try:
        _check_kind(os.fstat(handle).st_mode, file)
    except SparseCheckpointError:
        stream.close()
        raise
    return stream


def _check_kind(mode: int, file: Path) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "not a file")
        raise SparseCheckpointError(f"is {kind}; only regular files are read", file=file)


def read_bounded(file: Path, limit: int) -> bytes:
    """The bytes of a regular file.

    :raises SparseCheckpointError: as :func:`open_regular`, and if it holds more than ``limit`` bytes
    """
    with open_regular(file) as stream:
        try:
            data = stream.read(limit + 1) or b""
        except OSError as error:
            raise SparseCheckpointError(f"cannot be read: {error.strerror}", file=file) from error
    if len(data) > limit:
        raise SparseCheckpointError(f"is larger than {limit:,} bytes, which is the most that is read of it", file=file)
    return data


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of at most :data:`MAX_JSON_BYTES`.

    :raises SparseCheckpointError: if there is no such file or it holds anything else, see :func:`parse_json`
    """
    return parse_json(read_bounded(file, MAX_JSON_BYTES), file)


def parse_json(data: bytes, file: Path) -> dict[str, Any]:
    """The object that UTF-8 bytes say, stricter than Python: one parser's first key is not another's last.

    :param file: for messages
    :raises SparseCheckpointError: if they are not JSON, not an object, name a key twice, hold NaN or Infinity or a
        number that is too large, or nest deeper than 100
    """
    try:
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        _check_depth(found)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else str(error) or "it needs too much memory"
        raise SparseCheckpointError(f"cannot be read as JSON: {reason}", file=file) from error
    if not isinstance(found, dict):
        raise SparseCheckpointError("is not a JSON object", file=file)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {printable(twice, 200)!r} is there twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f'{name} is not a number of JSON; transformers writes {{"__float__": "{name}"}}')


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {printable(text, 40)} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"the number {printable(text, 40)} is too large")
    return int(text)


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(_MAX_DEPTH + 1):
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            return
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    raise RecursionError
