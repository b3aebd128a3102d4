"""``elsa eval``: tables, files, and what it refuses."""

import json
import sys

import pytest

from elsa_cli.several import _repeated
from elsa_modifier.evaluating.record import EVALUATION_FILE, Evaluation
from tests.cli.test_commands import run
from tests.evaluating.conftest import book, outputs, task

__all__ = ["book", "outputs", "task"]


def rows_of(shown):
    """First cells and others of a table of rich's."""
    lines = [line for line in shown.splitlines() if "│" in line]
    return {
        cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in (line.split("│")[1:-1] for line in lines)
    }


def test_the_table_has_the_dense_model_and_all_that_are_compared(outputs, book, tmp_path):
    base, dense, sparse = outputs
    result = run(
        "eval", dense, "--compare", sparse, base, "--data", book, "--window", 64, "--markdown", tmp_path / "t.md"
    )
    rows = rows_of(result.stdout)
    assert list(rows) == ["book.txt, perplexity", "book.txt, same first choice", "book.txt, KL from dense"]
    before, pruned, same, itself = rows["book.txt, perplexity"]
    assert before == itself and pruned == same != before
    assert rows["book.txt, KL from dense"][0] == "" and float(rows["book.txt, KL from dense"][1]) > 0
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert lines[0] == f"|  | dense: {base.name} | dense | sparse | {base.name} |"
    assert lines[2] == f"| book.txt, perplexity | {before} | {pruned} | {same} | {itself} |"
    assert "640" not in lines[6] and "630 tokens in windows of 64" in lines[6]


def test_it_is_saved_where_elsa_wrote_the_directory(outputs, book):
    base, dense, sparse = outputs
    run("eval", dense, "--compare", sparse, base, "--data", book, "--window", 64, "--windows", 3)
    assert not (base / EVALUATION_FILE).exists()
    saved = Evaluation.read(sparse)
    assert saved.model == str(sparse) and saved.dense == str(base) and saved.dtype == "float32"
    assert saved.perplexity[0].tokens == 3 * 63 and saved.perplexity == Evaluation.read(dense).perplexity
    assert saved.agreement[0].kl > 0 and saved.made["lm_eval"] is None
    (dense / EVALUATION_FILE).unlink()
    run("eval", dense, "--data", book, "--window", 64, "--windows", 3, "--no-save")
    assert not (dense / EVALUATION_FILE).exists()


def test_json(outputs, book, tmp_path):
    printed = run("eval", outputs[1], "--data", book, "--window", 64, "--no-dense", "--json", "-").stdout
    assert json.loads(printed)["agreement"] == [] and json.loads(printed)["dense"] is None
    run("eval", outputs[1], "--compare", outputs[2], "--data", book, "--no-dense", "--json", tmp_path / "all.json")
    both = json.loads((tmp_path / "all.json").read_text())
    assert [evaluation["model"] for evaluation in both] == [str(outputs[1]), str(outputs[2])]


def test_a_base_that_is_gone_is_said_and_one_that_was_named_is_an_error(outputs, book):
    dense = outputs[1]
    (dense / "elsa_history.json").write_text('{"model": "/gone"}')
    arguments = ["eval", dense, "--data", book, "--window", "64"]
    result = run(*arguments)
    assert "same first choice" not in result.stdout and "perplexity" in result.stdout
    assert "/gone cannot be loaded" in " ".join(run(*arguments, "--dense", "/gone", code=1).stderr.split())
    (dense / "README.md").write_text(f"---\nbase_model: {outputs[0]}\n---\n")
    assert "same first choice" in run(*arguments).stdout


def test_compressed(outputs, book):
    pytest.importorskip("elsa_kernels")
    found = json.loads(run("eval", outputs[2], "--data", book, "--compressed", "--json", "-").stdout)
    assert found["engine"] == "transformers, compressed" and found["agreement"][0]["kl"] > 0


def test_errors_are_a_line(outputs, book, monkeypatch):
    def said(*arguments):
        return " ".join(run("eval", outputs[1], *arguments, code=1).stderr.split())

    assert "there is nothing to measure" in said("--no-perplexity")
    assert "leave one out" in said("--dense", "x", "--no-dense")
    assert "leave --compare out" in said("--compare", "x", "--endpoint", "http://127.0.0.1:1")
    assert "there is no file none.txt" in said("--data", "none.txt")
    assert "--data texts.txt" in said("--data", "wikitext2")
    named = " ".join(run("eval", "a/name", "--save", "--data", book, code=1).stderr.split())
    assert "--save writes into the model's directory, and a/name is none" in named
    monkeypatch.setitem(sys.modules, "elsa_kernels", None)
    assert said("--data", book, "--compressed").startswith("error: compressed weights need")


def test_values_after_an_option():
    arguments = ["eval", "DIR", "--data", "a", "b", "--limit", "3", "x", "--data", "c", "--", "d"]
    expected = ["eval", "DIR", "--data", "a", "--data", "b", "--limit", "3", "x", "--data", "c", "--", "d"]
    assert _repeated(arguments, ("--data",)) == expected
