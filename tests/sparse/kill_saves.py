"""Kill -9 twenty saves at random moments, and look at what each left behind. Prints one JSON line.

Half of them write a new directory, half replace an older checkpoint. A script of its own because it forks.
"""

import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from elsa_sparse import SparseCheckpointError, open_checkpoint, save_sparse

SAVES = 20


def make_dense(directory: Path, seed: int) -> None:
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(8):
        tensor = torch.randn(512, 1024, generator=generator).to(torch.bfloat16)
        tensors[f"layers.{i}.weight"] = tensor * (torch.rand(tensor.shape, generator=generator) < 0.5)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))


def save(source: Path, out: Path) -> None:
    save_sparse(source, out, max_shard_size="1MB", overwrite=True, progress=False)


def start_save(source: Path, out: Path) -> int:
    """Process number of a child that saves and exits."""
    child = os.fork()
    if child == 0:
        save(source, out)
        os._exit(0)
    return child


def content(directory: Path) -> int | None:
    """Which of the models a directory holds, or None if it is no checkpoint; raises if it only looks like one."""
    try:
        checkpoint = open_checkpoint(directory)
    except SparseCheckpointError:
        return None
    with checkpoint:
        seed: int = checkpoint.config["seed"]
        checkpoint.verify()
        assert len(checkpoint.entries) == 8
    return seed


def main() -> None:
    torch.set_num_threads(1)  # threads would not survive the forks
    generator = random.Random(0)
    root = Path(tempfile.mkdtemp())
    for seed in (1, 2):
        make_dense(root / f"dense{seed}", seed)
    save(root / "dense1", root / "old")
    started = time.monotonic()
    os.waitpid(start_save(root / "dense2", root / "timed"), 0)
    duration = time.monotonic() - started

    killed, bad = 0, []
    for i in range(SAVES):
        place = root / f"place{i}"
        place.mkdir()
        out = place / "out"
        replaces = i % 2 == 1
        if replaces:
            shutil.copytree(root / "old", out)
        child = start_save(root / "dense2", out)
        time.sleep(generator.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        try:
            found = content(out)
            if found not in ((1, 2) if replaces else (None, 2)) or (found is None and out.exists()):
                bad.append(f"{i}: out holds {found}")
            # Whatever else lies there must not pass for a checkpoint that it is not.
            for other in place.iterdir():
                content(other)
            # The next save is not in the way of what the killed one left.
            save(root / "dense2", out)
            if content(out) != 2 or [path.name for path in place.iterdir()] != ["out"]:
                bad.append(f"{i}: not clean after the next save")
        except (SparseCheckpointError, AssertionError, OSError) as error:
            bad.append(f"{i}: {error}")
        shutil.rmtree(place)
    shutil.rmtree(root)
    print(json.dumps({"saves": SAVES, "killed": killed, "bad": bad}))


if __name__ == "__main__":
    main()
