"""Files that appear whole: whoever reads meanwhile finds the old or the new one."""

import os
import tempfile
from pathlib import Path

__all__ = ["write_bytes", "write_text"]


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file, all at once.

    :raises OSError: if it cannot be written
    """
    handle, partial = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


def write_text(file: Path, content: str) -> None:
    """The same of text, in UTF-8."""
    write_bytes(file, content.encode("utf-8"))
