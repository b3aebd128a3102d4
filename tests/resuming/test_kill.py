"""kill -9 at random moments, also while a checkpoint is written: the benchmark's own way, a few runs of it."""

import json
import subprocess
import sys


def test_killed_runs_end_with_the_same_bits():
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.kill_and_resume",
            "--runs",
            "3",
            "--ranks",
            "0",
            "--changes",
            "0",
            "--check",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 3
    assert all(row["same_weights"] and row["same_history"] and not row["left_over"] for row in rows), rows
    assert any("while a checkpoint was written" in row["kills"] for row in rows)
