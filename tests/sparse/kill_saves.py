"""Kill a save at every call that changes a directory, one after the other, and look at what each left behind.

``kill_saves.py CASE [--no-links]`` prints a JSON line: how many calls a save makes, and what was wrong. A script of its
own because it forks. CASE is what lies at the target: ``nothing``, ``empty`` directory, ``older`` checkpoint of ours,
``version1``, ``linked`` (a link to the older one), ``unpacked`` (which writes a dense checkpoint over a sparse one),
``notes`` (other files only).

A kill is ``os._exit`` before the call: no exception handler and no ``finally`` runs, as none does after ``kill -9``.
"""

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import elsa_sparse.writing
from elsa_sparse import SparseCheckpointError, open_checkpoint, save_sparse, unpack
from elsa_sparse.atomic import STAGE
from elsa_sparse.locking import LOCK_FILE

CASES = ("nothing", "empty", "notes", "older", "version1", "linked", "unpacked")
VERSION_1 = Path(__file__).parent / "data" / "sparse_version_1"
_CHANGES = {"os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.symlink", "os.truncate"}
_KILLED = 77


def make_dense(directory: Path, seed: int) -> None:
    """Three tensors, and companions: one that all seeds share, one that differs, one that this seed alone has."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(3):
        tensor = torch.randn(32, 64, generator=generator).to(torch.bfloat16)
        tensors[f"layers.{i}.weight"] = tensor * (torch.rand(tensor.shape, generator=generator) < 0.5)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "recipe.yaml").write_text(f"seed: {seed}")
    (directory / "original").mkdir()
    (directory / "original" / f"params{seed}.json").write_text(str(seed))


def save(source: Path, out: Path) -> None:
    save_sparse(source, out, max_shard_size="3KB", overwrite=True, progress=False)


def content(directory: Path) -> int | str | None:
    """Which model a directory holds, or None if it is no checkpoint; raises if it only looks like one."""
    if not (directory / "config.json").exists():
        return None
    config = json.loads((directory / "config.json").read_text())
    if "elsa_sparse" not in config:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        tensors = {name for file in set(index["weight_map"].values()) for name in load_file(directory / file)}
        assert tensors == index["weight_map"].keys()
        return f"dense {config['seed']}"
    with open_checkpoint(directory) as checkpoint:
        checkpoint.verify()
    return config.get("seed", "version 1")


def die_at(call: int, counter: Path) -> None:
    """Have this process end before it changes a directory for the ``call``-th time, and count how often it does."""
    count = 0

    def changes() -> None:
        nonlocal count
        count += 1
        if count == call:
            os._exit(_KILLED)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT):
            changes()

    write = elsa_sparse.writing.save_file

    def save_file_or_die(*arguments: object, **options: object) -> None:
        changes()  # written by a library of its own, which no hook sees
        write(*arguments, **options)  # type: ignore[arg-type]

    elsa_sparse.writing.save_file = save_file_or_die
    sys.addaudithook(watch)


def in_a_child(function: Callable[[], None]) -> int:
    """Exit status of a child that runs it."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException as error:  # nothing of the parent's may run in the child
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def snapshot(files: list[Path]) -> list[tuple[str, int, bytes]]:
    return [(str(file), file.lstat().st_ino, file.read_bytes()) for file in files]


class Place:
    """A fresh place with a target in it, and files that are someone else's around and inside."""

    def __init__(self, root: Path, case: str) -> None:
        self.case, self.parent = case, root / "place"
        self.parent.mkdir()
        self.out = self.parent / "out"
        real = self.parent / "real" if case == "linked" else self.out
        if case == "version1":
            shutil.copytree(VERSION_1, real)
            # Version 1 does not say that they are its own.
            for name in ("README.md", "generation_config.json"):
                (real / name).unlink()
        elif case in ("older", "linked", "unpacked"):
            shutil.copytree(root / "older", real)
        elif case != "nothing":
            real.mkdir()
        if case == "linked":
            self.out.symlink_to(real)
        (self.parent / ".out.partial").mkdir()
        theirs = [self.parent / ".out.partial" / "mine", self.parent / "beside"]
        if case not in ("nothing", "empty"):
            (real / "original").mkdir(exist_ok=True)
            theirs += [real / "notes.txt", real / "original" / "mine.json", real / "sparse-model-mine.safetensors"]
        for file in theirs:
            file.write_text(f"{file.name}, mine")
        self.theirs = theirs
        self.before = snapshot(theirs)
        self.inode = real.stat().st_ino if real.exists() else None
        self.old = content(self.out)
        self.names = self._names()

    def _names(self) -> set[str]:
        return {path.relative_to(self.parent).as_posix() for path in self.parent.rglob("*")}

    def run(self, root: Path) -> None:
        if self.case == "unpacked":
            unpack(root / "newer", self.out, max_shard_size="3KB", overwrite=True, progress=False)
        else:
            save(root / "dense2", self.out)

    def faults(self) -> list[str]:
        """What must not be, whatever happened."""
        found = []
        if snapshot(self.theirs) != self.before:
            found.append("someone else's file was touched")
        if self.inode is not None and self.out.stat().st_ino != self.inode:
            found.append("the directory is another")
        if self.case == "linked" and not self.out.is_symlink():
            found.append("the link is gone")
        if self.case == "nothing" and self.out.exists() and content(self.out) is None:
            found.append("there is a directory, and no checkpoint in it")
        if content(self.out) not in (self.old, self.expected):
            found.append(f"it holds {content(self.out)}")
        return found

    @property
    def expected(self) -> int | str:
        return "dense 2" if self.case == "unpacked" else 2

    def leftovers(self, complete: set[str]) -> set[str]:
        """Names that should not be there after a complete save, or should."""
        return {name for name in self._names() ^ complete if ".elsa-" in name or name.startswith("out")}


def without_links(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOTSUP, "no links here")


def main(case: str, links: bool) -> None:
    torch.set_num_threads(1)  # threads would not survive the forks
    os.fsync = lambda handle: None  # a killed process takes no written data with it
    if not links:
        os.link = without_links
    root = Path(tempfile.mkdtemp())
    for seed in (1, 2, 3):
        make_dense(root / f"dense{seed}", seed)
    save(root / "dense1", root / "older")
    save(root / "dense2", root / "newer")
    place = Place(root, case)
    place.run(root)
    complete, bad, call, killed = place._names(), [], 0, True
    if any(name.endswith((STAGE, LOCK_FILE)) or ".elsa-" in name for name in complete) or place.faults():
        bad.append(f"undisturbed: {sorted(complete)} {place.faults()}")
    shutil.rmtree(place.parent)
    states = set()
    while killed:
        call += 1
        place = Place(root, case)

        def die(place: Place = place, call: int = call) -> None:
            die_at(call, root)
            place.run(root)

        status = in_a_child(die)
        killed = status == _KILLED
        if status not in (0, _KILLED):
            bad.append(f"{call}: status {status}")
        try:
            bad += [f"{call}: {fault}" for fault in place.faults()]
            states.add(content(place.out))
            # A save that is refused puts everything back, or finishes it.
            if content(place.out) == place.old and case != "nothing":
                broken = root / "nowhere"
                try:
                    save_sparse(broken, place.out, overwrite=True, progress=False)
                except SparseCheckpointError:
                    if place._names() != place.names:
                        bad.append(f"{call}: not as before after a refusal: {place._names() ^ place.names}")
                bad += [f"{call}, refused: {fault}" for fault in place.faults()]
            if case != "unpacked" or content(place.out) == place.old:
                place.run(root)
            else:
                # A dense checkpoint is not replaced. What is left goes with the next save that is allowed.
                with suppress(FileExistsError):
                    save(root / "dense2", place.out)
            bad += [f"{call}, next: {fault}" for fault in place.faults()]
            if content(place.out) != place.expected or place.leftovers(complete):
                bad.append(f"{call}, next: {content(place.out)}, {sorted(place.leftovers(complete))}")
        except (SparseCheckpointError, AssertionError, OSError) as error:
            bad.append(f"{call}: {type(error).__name__} {error}")
        shutil.rmtree(place.parent)
    shutil.rmtree(root)
    print(json.dumps({"case": case, "calls": call - 1, "states": sorted(map(str, states)), "bad": bad}))


if __name__ == "__main__":
    main(sys.argv[1], "--no-links" not in sys.argv)
