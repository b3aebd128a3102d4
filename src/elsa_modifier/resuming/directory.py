"""A directory of training checkpoints: ``step-00000100`` and so on, each of which appears at one moment, complete."""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from loguru import logger

from elsa_modifier.resuming.manifest import CheckpointDamaged, Manifest, read_verified
from elsa_sparse.locking import DirectoryLock

__all__ = ["CheckpointDirectory", "complete_checkpoints", "find_checkpoint"]

_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial-"
_OLD = ".old-"


def complete_checkpoints(directory: Path) -> list[Path]:
    """All there are, whether damaged or not, the one after most steps first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """After how many steps a checkpoint was made."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def find_checkpoint(resume: str, directory: Path | None) -> tuple[Path, Manifest] | None:
    """The checkpoint to go on from, verified; None if there is none, under ``auto``.

    :param resume: ``auto``, the last one in ``directory`` that is as it was written; or the path of one, or of a
        directory of some
    :raises CheckpointDamaged: if what the path names is damaged, or all that there are
    :raises FileNotFoundError: if the path names no checkpoint
    """
    place = directory if resume == "auto" else Path(resume)
    if place is None:
        return None
    if resume != "auto" and (place / "manifest.json").exists():
        return place, read_verified(place)
    candidates = complete_checkpoints(place)
    if not candidates:
        if resume == "auto":
            return None
        raise FileNotFoundError(f"resume is {resume!r}, where there is no training checkpoint (step-...)")
    damage: CheckpointDamaged | None = None
    for candidate in candidates:
        try:
            return candidate, read_verified(candidate)
        except CheckpointDamaged as error:
            logger.warning(f"A training checkpoint is damaged, and the one before it is taken if there is one: {error}")
            damage = damage or error
    raise CheckpointDamaged.of(
        place, f"no training checkpoint in it can be read ({damage}); set resume to never to begin anew"
    )


class CheckpointDirectory:
    """A directory that this run alone writes checkpoints to, from :meth:`open` to :meth:`release`.

    Of several ranks the first opens it.

    :param keep: how many complete ones stay
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self._keep = keep
        self._lock: DirectoryLock | None = None
        self._stale: list[Path] = []

    def open(self) -> None:
        """Make it and lock it, and delete what a run that was killed did not complete.

        :raises FileExistsError: if another process has it open
        :raises OSError: if it cannot be made or written to
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = DirectoryLock(self.path)
        for left in self.path.iterdir():
            if left.name.startswith((_PARTIAL, _OLD)) and left.is_dir():
                shutil.rmtree(left, ignore_errors=True)

    def release(self) -> None:
        """Let others write to it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def go_on_from(self, checkpoint: Path | None) -> None:
        """Say which checkpoint this run goes on from; None is the beginning. Those that it does not come after go, once
        it has written one of its own."""
        there = complete_checkpoints(self.path)
        if checkpoint is not None and checkpoint.resolve().parent == self.path.resolve():
            self._stale = [path for path in there if step_of(path) > step_of(checkpoint)]
        else:
            self._stale = there
        if self._stale:
            logger.warning(
                f"{len(self._stale)} training checkpoints in {self.path} are not of this run's past "
                f"({self._stale[0].name} is the last); they are deleted once this run has written one"
            )

    def partial(self, step: int) -> Path:
        """Where the checkpoint of a step is to be written before it is complete."""
        return self.path / f"{_PARTIAL}step-{step:08d}"

    def discard(self, partial: Path) -> None:
        """Make room again after a failure."""
        shutil.rmtree(partial, ignore_errors=True)

    def commit(self, partial: Path) -> Path:
        """Give a complete checkpoint, which is on disk, its name, and delete those that are too many; its path."""
        place = self.path / partial.name.removeprefix(_PARTIAL)
        if place.exists():
            # Of a run that this one replaces; directories with files in them cannot be renamed over each other.
            os.rename(place, self.path / f"{_OLD}{place.name}")
        os.rename(partial, place)
        self._sync()
        shutil.rmtree(self.path / f"{_OLD}{place.name}", ignore_errors=True)
        stale = [path for path in self._stale if path != place]
        self._stale = []
        mine = [path for path in complete_checkpoints(self.path) if path not in stale]
        for path in [*stale, *mine[self._keep :]]:
            # Not half of one, should this process end now.
            old = self.path / f"{_OLD}{path.name}"
            with suppress(OSError):
                os.rename(path, old)
                shutil.rmtree(old)
        return place

    def _sync(self) -> None:
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
