"""Windows of tokens in a safetensors file that grows while they are made, and that is mapped when it is read.

What a run goes over need not fit in memory: neither when it is written nor when it is read.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["read_windows", "write_windows"]

_NAME = "tokens"
# The header is written last, when the number of windows is known, into room that was left for it.
_HEADER = 2048


def write_windows(
    file: Path,
    tokens: Iterable[np.ndarray],
    *,
    length: int,
    most: int,
    about: Callable[[], Mapping[str, str]] = dict,
) -> int:
    """Cut a stream of tokens into windows and write them; what is left over at its end is not written.

    The file appears at one moment, complete.

    :param tokens: pieces of the stream, int, of any lengths
    :param length: tokens of a window
    :param most: windows after which no more is asked of the stream
    :param about: asked at the end for what the file is to say of itself beside its tokens, some hundred characters
    :returns: how many windows there are
    :raises OSError: if it cannot be written
    """
    handle, partial = tempfile.mkstemp(prefix=".partial-", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(bytes(_HEADER))
            left, windows = most * length, 0
            for piece in tokens:
                part = np.asarray(piece, dtype="<i4")[:left]
                stream.write(part.tobytes())
                left -= len(part)
                if not left:
                    break
            windows = (most * length - left) // length
            stream.truncate(_HEADER + windows * length * 4)
            stream.seek(0)
            stream.write(_header(windows, length, about()))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    return windows


def read_windows(file: Path, *, length: int) -> tuple[Tensor, dict[str, str]]:
    """The windows of a file, (windows, length) int32, and what it says of itself.

    They are mapped, and read from the disk when they are looked at.

    :raises ValueError: if it is not a file of windows of this length
    """
    try:
        with safe_open(file, framework="pt") as opened:
            tokens: Tensor = opened.get_tensor(_NAME)
            about: dict[str, str] = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a file of tokens ({error})") from error
    if tokens.ndim != 2 or tokens.shape[1] != length or str(tokens.dtype) != "torch.int32":
        raise ValueError(f"{file} has {tokens.dtype} of shape {tuple(tokens.shape)}, not windows of {length} tokens")
    return tokens, about


def _header(windows: int, length: int, about: Mapping[str, str]) -> bytes:
    entry = {"dtype": "I32", "shape": [windows, length], "data_offsets": [0, windows * length * 4]}
    text = json.dumps({"__metadata__": dict(about), _NAME: entry}).encode()
    assert len(text) <= _HEADER - 8
    return (_HEADER - 8).to_bytes(8, "little") + text.ljust(_HEADER - 8)
