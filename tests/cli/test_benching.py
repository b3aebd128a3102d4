import json
import sys

import pytest

from tests.cli.test_commands import run

pytest.importorskip("elsa_kernels")

QUICK = ("--rounds", "1", "--tokens", "1", "--prompt", "4", "--batch", "2", "--threads", "1")


def test_the_table(sparse):
    shown = run("bench", sparse("llama-tied"), *QUICK, "--int8-head").stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert [row[0] for row in rows] == [
        "prefill, tokens/s",
        "decode, 2 at a time, tokens/s",
        "weights in memory, MB",
    ]
    header = next(line for line in shown.splitlines() if "compressed" in line)
    assert [cell.strip() for cell in header.split("┃")[1:-1]] == ["", "dense", "compressed", "ratio", "in a round"]
    assert "14 of 15 linear layers are compressed. bfloat16, 1 threads" in " ".join(shown.split())


def test_json(sparse):
    measured = json.loads(run("bench", sparse(), *QUICK, "--json").stdout)
    assert [(s["what"], s["batch"]) for s in measured["speeds"]] == [("prefill", 1), ("decode", 2)]
    assert all(s["ratio"] == pytest.approx(s["compressed"] / s["dense"]) for s in measured["speeds"])
    assert measured["compressed_bytes"] < measured["dense_bytes"] and measured["layers"] == [15, 15]
    batches = json.loads(run("bench", sparse(overwrite=True), *QUICK[:6], "--json").stdout)["speeds"]
    assert [s["batch"] for s in batches] == [1, 1, 4, 16]


def test_errors_are_a_line(sparse, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert "config.json: there is no such file" in run("bench", tmp_path / "empty", *QUICK, code=1).stderr
    assert "this model takes 64" in run("bench", sparse(), "--prompt", "90", code=1).stderr
    monkeypatch.setitem(sys.modules, "elsa_kernels", None)
    assert run("bench", tmp_path / "sparse", *QUICK, code=1).stderr.startswith("error: compressed weights need")
