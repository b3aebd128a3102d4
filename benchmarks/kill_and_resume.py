"""Pruning runs that are ended by SIGKILL at random moments and started again: are the final weights the same bits?

Tiny random models, on a CPU, with one thread: where a run is cut off does not depend on its size. Each run is started
again until it ends by itself, and killed up to four times on the way: half of the times at a moment drawn from the time
that a whole run takes, half of them as soon as a checkpoint is being written.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import killed_ranks
from benchmarks.killing import (
    STEPS,
    VARIANTS,
    being_written,
    count,
    fork,
    last_step,
    moment,
    prepare,
    prune,
    same_history,
    same_weights,
    step_to_kill_at,
    wait_for,
)
from benchmarks.measuring import append_row, publish, read_rows
from elsa_modifier.resuming.directory import complete_checkpoints
from elsa_modifier.resuming.manifest import read_verified


def started(directory: Path, number: int, out: str, fields: dict[str, Any]) -> Any:
    process = fork.Process(target=prune, args=(directory, number, out, fields))
    process.start()
    return process


def reference(directory: Path, number: int) -> float:
    """Run a variant without interruption; the seconds that it took."""
    began = time.monotonic()
    process = started(directory, number, f"reference-{number}", list(VARIANTS.values())[number][1])
    wait_for(process, directory)
    return time.monotonic() - began


def kill_and_resume(directory: Path, number: int, seed: int, seconds: float) -> dict[str, Any]:
    """One run, killed at moments drawn from the seed, and what came out of it."""
    drawn = random.Random(seed)
    out = f"run-{seed}"
    training = directory / f"{out}-training"
    fields = list(VARIANTS.values())[number][1]
    wanted, kills = drawn.randint(1, 4), Counter[str]()
    starts, resumed_from = 0, []
    while True:
        resumed_from.append(last_step(training))
        process = started(directory, number, out, fields)
        starts += 1
        if kills.total() < wanted:
            if drawn.random() < 0.5:
                process.join(drawn.uniform(0, seconds))
            else:
                step = step_to_kill_at(resumed_from[-1], drawn)
                while process.is_alive() and not being_written(training, step):
                    time.sleep(0.0005)
                time.sleep(drawn.uniform(0, 0.02))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills[moment(training)] += 1
                for checkpoint in complete_checkpoints(training):
                    read_verified(checkpoint)
                continue
        wait_for(process, directory)
        break
    return {
        "variant": list(VARIANTS)[number],
        "seed": seed,
        "starts": starts,
        "resumed_from": resumed_from,
        "kills": dict(kills),
        "same_weights": same_weights(directory / out, directory / f"reference-{number}"),
        "same_history": same_history(directory / out, directory / f"reference-{number}"),
        "left_over": [path.name for path in training.iterdir() if path.name.startswith(".")],
    }


def page() -> None:
    """Write the page from all rows, the last one of a run counting."""
    alone, ranks, changed = (
        list({row["seed"]: row for row in read_rows("kill_and_resume") if field in row}.values())
        for field in ("starts", "ranks", "changes")
    )
    publish("kill_and_resume", ["# Killed and resumed", "", *_page(alone), *killed_ranks.page(ranks, changed)])


def _page(rows: list[dict[str, Any]]) -> list[str]:
    kills: Counter[str] = sum((Counter(row["kills"]) for row in rows), Counter())
    lines = [
        f"`python -m benchmarks.kill_and_resume`: {len(rows)} pruning runs of {STEPS} steps, with a training "
        "checkpoint every 2 steps, ended by SIGKILL at random moments and started again until they ended by "
        "themselves. Tiny random models, on a CPU, with one thread.",
        "",
        "Final weights the same bits as those of a run that nothing had cut off: "
        f"**{count(rows, 'same_weights')} of {len(rows)}**. Histories (loss, gradient norm, residual of every step) "
        f"the same: {count(rows, 'same_history')} of {len(rows)}. After each kill every checkpoint with a final name "
        "had the checksums that it was written with.",
        "",
        f"{kills.total()} kills: " + ", ".join(f"{n} {when}" for when, n in sorted(kills.items())) + ".",
        "",
        "| run | starts | kills | went on after steps | same weights |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['variant']} | {row['starts']} | {sum(row['kills'].values())} | "
        f"{', '.join(map(str, row['resumed_from']))} | {'yes' if row['same_weights'] else '**no**'} |"
        for row in rows
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="of one process")
    parser.add_argument("--ranks", type=int, default=10, help="runs on two ranks, of which one is killed")
    parser.add_argument("--changes", type=int, default=5, help="runs that go on on another number of ranks")
    parser.add_argument("--check", action="store_true", help="print rows, and write neither them nor the page")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        prepare(directory)
        for row in _rows(directory, options.runs, options.ranks, options.changes):
            if options.check:
                print(json.dumps(row), flush=True)
            else:
                append_row("kill_and_resume", row)
    if not options.check:
        page()


def _rows(directory: Path, runs: int, ranks: int, changes: int) -> Iterator[dict[str, Any]]:
    seconds = [reference(directory, number) for number in range(min(runs, len(VARIANTS)))]
    for seed in range(runs):
        number = seed % len(VARIANTS)
        yield kill_and_resume(directory, number, seed, seconds[number])
    yield from killed_ranks.rows(directory, ranks, changes)


if __name__ == "__main__":
    main()
