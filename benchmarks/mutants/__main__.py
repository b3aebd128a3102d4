"""How many small faults the tests notice: a seeded sample of mutants, each against the tests that run its line.

    python -m benchmarks.mutants --count 300 --seed 0 --minutes 40 --jobs 2

Sources are not changed: each mutant is a copy. Results are appended one by one, and a run that was cut short goes on
where it ended; results of other sources or tests are dropped. ``equivalent.yaml`` lists what changes no behaviour.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

# Before torch is imported: a process with threads cannot be forked. Under CI hypothesis draws the same examples again.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CI": "1"}

import yaml

from benchmarks.mutants.mutations import GROUPS, Mutant, all_mutants, sample
from benchmarks.mutants.running import ROOT, Coverage, Run, preload, tree_hash

EQUIVALENT = Path(__file__).parent / "equivalent.yaml"
RESULTS = ROOT / "benchmarks" / "results"
# A survivor is run against all of its tests; beyond this many seconds of them, the slowest are left out.
MOST_SECONDS = 60.0

_EXPLANATION = (
    "`make mutants` runs this and writes it; `benchmarks/results/mutants*.jsonl` has every mutant. Faults in "
    "annotations, in messages and in arguments that only an accelerator tells apart are left out. A mutant that runs "
    "out of time is noticed; one that no test reaches is not. Those that change no behaviour do not count; "
    "`benchmarks/mutants/equivalent.yaml` says why."
)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="mutants in the sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long; run again to go on")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time, each on one core")
    parser.add_argument("--name", default="mutants", help="of the file in benchmarks/results")
    parser.add_argument("--only", help="only mutants whose id contains this")
    parser.add_argument("--report", action="store_true", help="write docs/results/mutants.md, run nothing")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no child outlives this
    file = RESULTS / f"{arguments.name}.jsonl"
    if not arguments.report:
        mutants = sample(all_mutants(ROOT / "src"), arguments.count, arguments.seed)
        if arguments.only:
            mutants = [mutant for mutant in mutants if arguments.only in mutant.id]
        run_all(mutants, file, minutes=arguments.minutes, jobs=arguments.jobs)
    write_report()


def run_all(mutants: list[Mutant], file: Path, *, minutes: float, jobs: int) -> None:
    """Run what ``file`` has no result of, and append to it."""
    tree = tree_hash()
    rows = [row for row in _rows(file) if row["tree"] == tree]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = {row["id"] for row in rows}
    waiting = [mutant for mutant in mutants if mutant.id not in done][::-1]
    coverage = Coverage(ROOT / "out" / "mutants" / f"{tree}.json")
    preload(coverage.modules)
    until = time.monotonic() + 60 * minutes
    running: list[tuple[Run, Row]] = []
    try:
        while running or (waiting and time.monotonic() < until):
            if len(running) < jobs and waiting and time.monotonic() < until:
                mutant = waiting.pop()
                tests, left_out = _affordable(coverage, coverage.tests(mutant))
                row = {key: getattr(mutant, key) for key in ("id", "group", "operator", "before", "after")}
                row |= {"tree": tree, "tests": len(tests), "tests_left_out": left_out}
                if tests:
                    running.append((Run(tests, mutant, 30 + 5 * sum(coverage.seconds[test] for test in tests)), row))
                else:
                    _append(file, row | {"status": "uncovered", "seconds": 0.0})
                continue
            for run, row in list(running):
                if (ended := run.poll()) is not None:
                    running.remove((run, row))
                    outcome, result = ended
                    row |= {"status": {"passed": "survived"}.get(outcome, outcome)}
                    row |= {"by": result["failed"][:1], "seconds": round(time.monotonic() - run.started, 1)}
                    _append(file, row | ({"output": result["output"]} if outcome == "broken" else {}))
            time.sleep(0.05)
    finally:
        for run, _ in running:
            run.stop()
    print(f"{len(waiting)} of {len(mutants)} mutants are left", flush=True)


def _affordable(coverage: Coverage, tests: list[str]) -> tuple[list[str], int]:
    total, chosen = 0.0, []
    for test in tests:
        total += coverage.seconds[test]
        if total > MOST_SECONDS:
            break
        chosen.append(test)
    return chosen, len(tests) - len(chosen)


def _rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _append(file: Path, row: Row) -> None:
    print(f"{row['status']:9} {row['seconds']:6.1f} s  {row['id']}  {row['before']}  ->  {row['after']}", flush=True)
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def write_report() -> None:
    """Tables of ``mutants_before.jsonl`` and ``mutants.jsonl``, and what survived in the latter."""
    listed = yaml.safe_load(EQUIVALENT.read_text()) or []
    why = {(entry["file"], entry["before"], entry["after"]): entry["why"] for entry in listed}
    lines = ["# Faults that the tests notice", "", " ".join((__doc__ or "").split("\n\n")[0].split()), ""]
    lines += [_EXPLANATION]
    for title, name in (
        ("Before tests were written against its survivors (seed 0)", "mutants_before"),
        ("Now", "mutants"),
    ):
        rows = _rows(RESULTS / f"{name}.jsonl")
        for row in rows:
            if row["status"] in ("survived", "uncovered") and (_file(row), row["before"], row["after"]) in why:
                row["status"] = "equivalent"
        if rows:
            lines += ["", f"## {title}", "", *_table(rows)]
    survivors = [row for row in rows if row["status"] in ("survived", "uncovered")]
    lines += ["", "## What goes unnoticed", ""] if survivors else []
    for row in survivors:
        lines.append(f"- `{row['id'].rsplit(':', 1)[0]}`, {row['status']}: `{row['before']}` -> `{row['after']}`")
    page = ROOT / "docs" / "results" / "mutants.md"
    page.write_text("\n".join(lines) + "\n")
    print(page.read_text())


def _file(row: Row) -> str:
    return str(row["id"]).split(":")[0]


def _table(rows: list[Row]) -> list[str]:
    statuses = ("killed", "timeout", "survived", "uncovered", "equivalent")
    lines = [f"| | mutants | {' | '.join(statuses)} | score |", "|---" * (len(statuses) + 3) + "|"]
    for group in (*GROUPS, "all"):
        of_group = [row["status"] for row in rows if group in (row["group"], "all")]
        counts = {status: of_group.count(status) for status in statuses}
        counted = sum(counts.values()) - counts["equivalent"]
        score = f"{(counts['killed'] + counts['timeout']) / counted:.0%}" if counted else ""
        lines.append(f"| {group} | {len(of_group)} | {' | '.join(map(str, counts.values()))} | {score} |")
    return lines


if __name__ == "__main__":
    main()
