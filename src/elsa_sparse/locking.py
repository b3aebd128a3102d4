"""A lock on a directory, for processes on one machine: one file in it, which goes when the lock is released."""

import fcntl
import os
from pathlib import Path

__all__ = ["LOCK_FILE", "DirectoryLock"]

LOCK_FILE = ".elsa-save.lock"


class DirectoryLock:
    """Held from construction to :meth:`release`; the system ends it with the process, however that ends.

    A file of its own, since some file systems (NFS) lock nothing that is not open for writing.

    :raises FileExistsError: if another process holds it
    :raises FileNotFoundError: if there is no such directory, or no longer
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        while True:
            handle = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                if self._take(handle):
                    break
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
        self._handle = handle

    def _take(self, handle: int) -> bool:
        """Lock the file, and say whether it still is the one in the directory: its last holder may have deleted it."""
        file = self.directory / LOCK_FILE
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"another process is writing {self.directory}") from error
        except OSError as error:
            raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(file)) from error
        locked = os.fstat(handle)
        if locked.st_size:
            raise FileExistsError(f"{file} is not empty, so it is not a lock; move it away")
        try:
            return os.path.samestat(locked, os.lstat(file))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Delete the file, in ``directory``, and give up the lock."""
        try:
            (self.directory / LOCK_FILE).unlink(missing_ok=True)
        finally:
            os.close(self._handle)
