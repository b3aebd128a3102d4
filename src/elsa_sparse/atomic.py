"""Putting a checkpoint's files into a directory at one moment, without touching files that are not its own.

Everything is first written to ``.elsa-save`` inside the directory, so that links and mount points make no difference,
and flushed to disk. Then files get their places: weights under names that nothing else has, companions over those of
the checkpoint before, which are kept aside. Renaming ``config.json`` is the one moment from which the new checkpoint
counts. After it, what the one before had written and nobody changed is deleted. A journal says what was being done, so
that the next save undoes or finishes what a killed one began.

A directory that does not exist is made beside its place, as ``.<name>.elsa-<random>``, and renamed when it is complete.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elsa_sparse.locking import LOCK_FILE, DirectoryLock
from elsa_sparse.owned import is_plain_file, owned_files, remove_owned, sha256_of, still_is
from elsa_sparse.table import CONFIG_FILE

__all__ = ["Staging", "check_target", "staged"]

STAGE = ".elsa-save"
_JOURNAL = "journal.json"
_PARTS_OF_STAGE = {"new", "old", "scratch", _JOURNAL}
# What a program that looks for a model would take for one.
_MODELS = ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")


class Staging:
    """Where a checkpoint is written before it is one.

    :param directory: where it will be
    :param new: empty, to be filled with its files
    :param scratch: empty, for whatever is needed meanwhile
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.new, self.scratch = directory / STAGE / "new", directory / STAGE / "scratch"
        self.committed = False
        self._owned = owned_files(directory) or {}
        self._config = _content(directory / CONFIG_FILE)
        for part in (self.new, self.scratch, directory / STAGE / "old"):
            part.mkdir(parents=True)

    def is_free(self, name: str) -> bool:
        """Whether nothing of that name is there but what an older checkpoint brought."""
        return not os.path.lexists(self.directory / name) or still_is(self.directory, name, self._owned.get(name))

    def allows(self, name: str, content: Path) -> bool:
        """Whether a file can have this name; not needed if someone else's with the same content has it already.

        :raises FileExistsError: if someone else's file of that name has other content
        """
        for parent in reversed(Path(name).parents):
            place = self.directory / parent
            if place.is_symlink() or (place.exists() and not place.is_dir()):
                raise _foreign(place)
        if self.is_free(name):
            return True
        there = self.directory / name
        if there.is_file() and sha256_of(there) == sha256_of(content):
            return False
        raise _foreign(there)

    def settle(self) -> dict[str, str]:
        """SHA-256 by name of the files in ``new``, from which those are taken that are already there.

        :raises FileExistsError: as :meth:`allows`
        """
        for file in _files(self.new):
            if not self.allows(file, self.new / file):
                (self.new / file).unlink()
        return {file: sha256_of(self.new / file) for file in _files(self.new)}

    def commit(self, files: dict[str, str]) -> None:
        """Have what is in ``new`` take the place of the older checkpoint.

        :param files: SHA-256 by name of all of it but ``config.json``
        :raises FileExistsError: if files of these names have appeared meanwhile
        """
        stage = self.directory / STAGE
        for path in (self.new / CONFIG_FILE, *self.new.rglob("*"), self.new):
            _sync(path)
        journal = stage / "scratch" / _JOURNAL
        parents = {parent.as_posix() for name in files for parent in Path(name).parents if parent.name}
        made = sorted(parent for parent in parents if not (self.directory / parent).exists())
        text = json.dumps({"old": self._owned, "new": files, "directories": made})
        journal.write_text(text, encoding="utf-8")
        _sync(journal)
        journal.replace(stage / _JOURNAL)
        _sync(stage)
        for name, sha256 in files.items():
            self._place(name, sha256)
        _sync(self.directory)
        if _content(self.directory / CONFIG_FILE) != self._config:
            raise _foreign(self.directory / CONFIG_FILE)
        os.replace(self.new / CONFIG_FILE, self.directory / CONFIG_FILE)
        self.committed = True
        _sync(self.directory)

    def _place(self, name: str, sha256: str) -> None:
        source, place = self.new / name, self.directory / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if still_is(self.directory, name, sha256):
            return
        if not self.is_free(name):
            raise _foreign(place)
        if os.path.lexists(place):
            self._keep(name)
            os.replace(source, place)
        else:
            try:
                os.link(source, place)
            except OSError as error:
                # A name that is taken by now; or a file system without links.
                if os.path.lexists(place):
                    raise _foreign(place) from error
                os.rename(source, place)
        _sync(place.parent)

    def _keep(self, name: str) -> None:
        """Keep an older file until the new checkpoint counts."""
        kept = self.directory / STAGE / "old" / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(self.directory / name, kept)
        except OSError:
            copy = self.scratch / "copy"
            shutil.copy2(self.directory / name, copy)
            _sync(copy)
            os.rename(copy, kept)
        _sync(kept.parent)


def check_target(target: Path, *, overwrite: bool, names: Iterable[str] = ()) -> None:
    """Whether a checkpoint can be written to a directory without harm to what is there. Nothing is touched.

    :param names: of companions that it will have, whatever they hold
    :raises FileExistsError: if the message says why not
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; name a directory")
    found = [path for path in target.iterdir() if path.name not in (STAGE, LOCK_FILE)] if target.is_dir() else []
    if found and not overwrite:
        raise FileExistsError(f"{target} exists and is not empty; name another directory, or allow overwriting it")
    owned = owned_files(target)
    for path in found:
        if path.name == CONFIG_FILE and owned is None:
            raise _foreign(path)
        if (path.name in names or any(path.match(p) for p in _MODELS)) and not still_is(
            target, path.name, (owned or {}).get(path.name)
        ):
            raise _foreign(path)


@contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Staging]:
    """A place for a checkpoint's files, which become ``target``'s when it is committed.

    Until then ``target``, if it exists, is what it was; killed at any moment, it holds the old or the new checkpoint.

    :param target: need not exist; its parent is made
    :param overwrite: allow that it exists and is not empty. Files that this package did not write, or that were changed
        since, stay whatever happens
    :raises FileExistsError: if it does and may not, if files in it are in the way, or another process is writing it
    """
    target = Path(os.path.realpath(target))
    if not any((target / name).exists() for name in (STAGE, LOCK_FILE)):
        check_target(target, overwrite=overwrite)
    if not target.exists():
        with _made_beside(target) as staging:
            yield staging
        return
    lock = DirectoryLock(target)
    try:
        _recover(target)
        check_target(target, overwrite=overwrite)
        try:
            yield Staging(target)
        finally:
            _recover(target)
    finally:
        lock.release()


@contextmanager
def _made_beside(target: Path) -> Iterator[Staging]:
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(target)
    lock = _lock_new_directory(target)
    try:
        staging = Staging(lock.directory)
        yield staging
        if staging.committed:
            try:
                # Onto an empty directory it would succeed.
                if os.path.lexists(target):
                    raise FileExistsError
                os.rename(lock.directory, target)
            except OSError as error:
                if not os.path.lexists(target):
                    raise
                raise FileExistsError(f"another process has made {target} meanwhile") from error
            lock.directory = target
            _sync(target.parent)
    finally:
        if lock.directory == target:
            _recover(target)
            lock.release()
        else:
            _discard(lock)


def _siblings_prefix(target: Path) -> str:
    return f".{target.name[:50]}.elsa-"


def _lock_new_directory(target: Path) -> DirectoryLock:
    while True:
        directory = target.with_name(_siblings_prefix(target) + uuid.uuid4().hex)
        directory.mkdir()
        # Until it is locked, another process may take it for one that was abandoned.
        with suppress(FileNotFoundError, FileExistsError):
            return DirectoryLock(directory)


def _clear_abandoned(target: Path) -> None:
    """Delete what killed processes left beside ``target``.

    :raises FileExistsError: if one that is alive is making it
    """
    prefix = re.escape(_siblings_prefix(target))
    for path in sorted(target.parent.iterdir()):
        if not re.fullmatch(prefix + "[0-9a-f]{32}", path.name) or path.is_symlink() or not path.is_dir():
            continue
        with suppress(FileNotFoundError):
            if any(path.iterdir()) and not (path / LOCK_FILE).exists():
                continue  # whatever it is, it is not locked by us
            try:
                lock = DirectoryLock(path)
            except FileExistsError as error:
                raise FileExistsError(f"another process is writing {target}") from error
            _discard(lock)


def _discard(lock: DirectoryLock) -> None:
    """Delete an unfinished directory of our own, unless someone has put a file there."""
    try:
        _recover(lock.directory, discard=True)
    finally:
        lock.release()
        with suppress(OSError):
            lock.directory.rmdir()


def _recover(directory: Path, *, discard: bool = False) -> None:
    """Undo, or once ``config.json`` is in place finish, what the journal says, and clear the stage. Idempotent.

    :param discard: undo in any case
    """
    stage = directory / STAGE
    if not stage.exists():
        return
    if stage.is_symlink() or not stage.is_dir() or {path.name for path in stage.iterdir()} - _PARTS_OF_STAGE:
        raise FileExistsError(f"{stage} holds files that are not of an unfinished save; move it away")
    if (stage / _JOURNAL).exists():
        journal = json.loads((stage / _JOURNAL).read_text(encoding="utf-8"))
        committed = not (stage / "new" / CONFIG_FILE).exists()
        if committed and not discard:
            for name in journal["old"].keys() - journal["new"].keys():
                remove_owned(directory, name, journal["old"][name])
        else:
            for name, sha256 in journal["new"].items():
                _undo(directory, name, sha256)
            for name in reversed(journal["directories"]):
                with suppress(OSError):  # there is none, or it holds something else
                    (directory / name).rmdir()
            if committed:
                (directory / CONFIG_FILE).unlink(missing_ok=True)
        _sync(directory)
        (stage / _JOURNAL).unlink()
        _sync(stage)
    shutil.rmtree(stage)


def _undo(directory: Path, name: str, sha256: str) -> None:
    source, kept, place = (directory / STAGE / "new" / name), (directory / STAGE / "old" / name), directory / name
    if kept.exists():
        if still_is(directory, name, sha256):
            os.replace(kept, place)
    elif source.exists():
        if is_plain_file(directory, name) and os.path.samefile(source, place):
            remove_owned(directory, name, sha256)
    else:
        remove_owned(directory, name, sha256)


def _foreign(file: Path) -> FileExistsError:
    return FileExistsError(
        f"{file} was not written by elsa-modifier, or was changed since, and would be replaced; move it away, or name "
        "another directory"
    )


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _files(directory: Path) -> list[str]:
    """Names of all files below a directory, relative to it."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())


def _sync(path: Path) -> None:
    """Have it on disk before it counts, so that a power cut leaves no empty file under a final name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
