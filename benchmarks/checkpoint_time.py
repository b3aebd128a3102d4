"""What training checkpoints cost on a CPU: seconds that a run waits for one, written by itself or by another thread.

SmolLM2-135M with fp32 Adam. Steps are short, so that a checkpoint every two steps weighs as much as it can.
"""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llmcompressor import oneshot

from benchmarks.assets import model_directory, training_texts
from benchmarks.measuring import publish
from elsa_modifier import ELSAModifier
from elsa_modifier.resuming.checkpoints import TrainingCheckpoints
from elsa_modifier.resuming.directory import complete_checkpoints
from elsa_modifier.resuming.manifest import read_verified

STEPS = 7
ROUNDS = 2
_MODES = {"none": None, "before the next step": False, "in a thread, from a copy": True}


class _Timed(TrainingCheckpoints):
    """Notes when each step ended, before and after what is done between steps."""

    asynchronous: bool | None = None
    times: list[tuple[int, float, float]]

    def after_step(self, step: int, catch_up: Any) -> None:
        began = time.perf_counter()
        super().after_step(step, catch_up)
        type(self).times.append((step, began, time.perf_counter()))

    def _can_copy(self, tensors: Any) -> bool:
        return bool(type(self).asynchronous)


def measure(mode: str, directory: Path) -> dict[str, float]:
    """A run of a few steps: median seconds of a step without a checkpoint, and from one checkpoint to the next."""
    _Timed.times, _Timed.asynchronous = [], _MODES[mode]
    every = {"steps": 2 if _MODES[mode] is not None else 10**6}
    modifier = ELSAModifier(
        sparsity=0.8,
        steps=STEPS,
        batch_size=1,
        sequence_length=64,
        objective="next_token",
        checkpoint_every=every,
        checkpoint_dir=str(directory),
    )
    with patch("elsa_modifier.resuming.session.TrainingCheckpoints", _Timed):
        oneshot(model=str(model_directory()), dataset=training_texts(), recipe=[modifier])
    # Not the last step, whose checkpoint is always waited for.
    times = _Timed.times[:-1]
    of_two = [b[1] - a[1] for a, b in zip(times[1::2], times[3::2], strict=False)]
    waited = [end - begin for step, begin, end in times if step % 2 == 0]
    return {"two_steps": statistics.median(of_two), "waited": statistics.median(waited)}


def main() -> None:
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in _MODES}
    for _ in range(ROUNDS):
        for mode in _MODES:
            with tempfile.TemporaryDirectory(prefix="elsa-time-") as made:
                found[mode].append(measure(mode, Path(made)))
                last = complete_checkpoints(Path(made))[0]
                size = sum(file.stat().st_size for file in last.iterdir())
                began = time.perf_counter()
                read_verified(last)
                reading = time.perf_counter() - began
                shutil.rmtree(last)
            print(mode, found[mode][-1], f"{size / 1e6:.0f} MB, read and verified in {reading:.1f} s", flush=True)
    rows = {
        mode: [statistics.median(run[key] for run in runs) for key in ("two_steps", "waited")]
        for mode, runs in found.items()
    }
    lines = [
        "# What a training checkpoint takes",
        "",
        f"`python -m benchmarks.checkpoint_time`: SmolLM2-135M, fp32 Adam, {os.cpu_count()} CPU cores, steps of 64 "
        f"tokens, a checkpoint of {size / 1e6:,.0f} MB every 2 steps; medians of {ROUNDS} runs. Reading one and its "
        f"checksums took {reading:.1f} s.",
        "",
        "| checkpoints | s for 2 steps and what is between them | of these s waited for the checkpoint |",
        "|---|---|---|",
        *(f"| {mode} | {steps:.1f} | {waited:.1f} |" for mode, (steps, waited) in rows.items()),
    ]
    publish("checkpoint_time", lines)


if __name__ == "__main__":
    main()
