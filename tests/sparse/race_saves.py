"""Rounds of processes that save into one directory at once. Prints a JSON line.

``race_saves.py ROUNDS``. Rounds differ in what lies there: nothing, an empty directory, an older checkpoint with other
people's files beside it, the same behind a link. In every round at least one save has to succeed, the others have to
say why not, the directory has to hold one of the saved checkpoints, and nobody's file may be touched.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests.sparse.kill_saves import Place, content, make_dense, save

SAVERS = 4
CASES = ("nothing", "empty", "older", "linked")
_REFUSED = 5


def race(root: Path, out: Path, generator: random.Random) -> list[int]:
    """Exit statuses of processes that wait for each other, and save a checkpoint each, some a moment later."""
    gate, opener = os.pipe()
    children = []
    for seed in range(1, SAVERS + 1):
        delay = generator.choice([0, generator.uniform(0, 0.2)])
        child = os.fork()
        if child == 0:
            os.close(opener)
            os.read(gate, 1)  # returns when the parent closes its end
            time.sleep(delay)
            status = 1
            try:
                save(root / f"dense{seed}", out)
                status = 0
            except FileExistsError as error:
                status = _REFUSED if "another process" in str(error) else 1
                if status == 1:
                    print(error, file=sys.stderr)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(status)
        children.append(child)
    os.close(gate)
    os.close(opener)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(rounds: int) -> None:
    torch.set_num_threads(1)  # threads would not survive the forks
    os.fsync = lambda handle: None
    root = Path(tempfile.mkdtemp())
    for seed in range(1, SAVERS + 1):
        make_dense(root / f"dense{seed}", seed)
    save(root / "dense1", root / "older")
    statuses: Counter[int] = Counter()
    bad = []
    generator = random.Random(0)
    for i in range(rounds):
        place = Place(root, CASES[i % len(CASES)])
        ended = race(root, place.out, generator)
        statuses.update(ended)
        saved = {seed for seed, status in enumerate(ended, 1) if status == 0}
        if not saved or set(ended) - {0, _REFUSED}:
            bad.append(f"{i}: ended with {ended}")
        faults = [fault for fault in place.faults() if not fault.startswith("it holds")]
        if content(place.out) not in saved:
            faults.append(f"it holds {content(place.out)}, saved were {saved}")
        left = [name for name in place._names() if ".elsa-" in name]
        bad += [f"{i}: {fault}" for fault in [*faults, *left]]
        # What the winner does not list as its own must be someone else's.
        listed = json.loads((place.out / "config.json").read_text())["elsa_sparse"]["files"].keys() | {"config.json"}
        found = {path.relative_to(place.out).as_posix() for path in place.out.rglob("*") if path.is_file()}
        bad += [f"{i}: {name} is nobody's" for name in found - listed if "mine" not in name and name != "notes.txt"]
        shutil.rmtree(place.parent)
    shutil.rmtree(root)
    print(json.dumps({"rounds": rounds, "saved": statuses[0], "refused": statuses[_REFUSED], "bad": bad}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
