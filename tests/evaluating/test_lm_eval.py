"""Tasks agree with lm-eval run by hand, to the last digit; and lm-eval's own command takes sparse directories."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_commands import run

pytest.importorskip("lm_eval")

# What pip installs as `lm_eval` and `elsa`, of this interpreter.
LM_EVAL = [sys.executable, "-m", "lm_eval"]
ELSA = [sys.executable, "-c", "from elsa_cli.main import app; app()", "lm-eval"]


def by_hand(directory, task, *, limit=None, dtype="auto"):
    """What lm-eval finds without this package's code."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(directory), batch_size=8, device="cpu", dtype=dtype)
    manager = TaskManager(include_path=str(task), include_defaults=False)
    return simple_evaluate(model=model, tasks=["next_word"], limit=limit, task_manager=manager)["results"]["next_word"]


@pytest.mark.parametrize("limit", [None, 10])
def test_the_last_digit(limit, outputs, task, caplog):
    _, dense, sparse = outputs
    arguments = ["--no-perplexity", "--tasks", "next_word", "--include-path", task, "--device", "cpu", "--json", "-"]
    arguments += [] if limit is None else ["--limit", limit]
    expected = by_hand(dense, task, limit=limit)
    for directory in (dense, sparse):
        results = json.loads(run("eval", directory, *arguments).stdout)["tasks"]
        assert {r["metric"]: (r["value"], r["stderr"]) for r in results} == {
            metric: (expected[f"{metric},none"], expected[f"{metric}_stderr,none"]) for metric in ("acc", "acc_norm")
        }
        assert {(r["task"], r["limit"], r["samples"], r["fewshot"]) for r in results} == {
            ("next_word", limit, limit or 24, 0)
        }
    assert "already-initialized" not in caplog.text
    assert 0 < expected["acc,none"] < 1


def lm_eval_found(command, directory, task, out):
    arguments = ["--model", "hf", "--model_args", f"pretrained={directory}", "--tasks", "next_word", "--device", "cpu"]
    arguments += ["--include_path", str(task), "--batch_size", "8", "--output_path", str(out)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if done.returncode:
        return done.stderr
    [file] = Path(out).rglob("results_*.json")
    return json.loads(file.read_text())["results"]["next_word"]


def test_lm_evals_own_command(outputs, task, tmp_path):
    _, dense, sparse = outputs
    plain = lm_eval_found(LM_EVAL, dense, task, tmp_path / "plain")
    ours = lm_eval_found(ELSA, sparse, task, tmp_path / "ours")
    assert plain["acc,none"] == ours["acc,none"] and plain["acc_norm,none"] == ours["acc_norm,none"]
    # Without it transformers is told what the directory is.
    assert "this directory is a sparse checkpoint" in lm_eval_found(LM_EVAL, sparse, task, tmp_path / "none")


def test_an_unknown_task_is_refused_before_a_model_is_loaded(tmp_path, task):
    said = run("eval", tmp_path / "no-model", "--no-perplexity", "--tasks", "arc_easi", code=1).stderr
    assert "lm-eval knows no task 'arc_easi'; did you mean arc_easy" in " ".join(said.split())


def test_the_tasks_of_the_paper_exist():
    from elsa_modifier.evaluating.tasks import PAPER_TASKS, TaskSettings, check_tasks

    check_tasks(TaskSettings(("paper",)))
    assert len(PAPER_TASKS) == 7 and TaskSettings(("rte", "paper")).expanded[0] == "rte"
    assert sorted(TaskSettings(("rte", "paper")).expanded) == sorted(PAPER_TASKS)


def test_without_questions_the_message_says_what_to_do(outputs):
    said = run("eval", outputs[1], "--no-perplexity", "--tasks", "arc_easy", code=1).stderr
    assert "questions cannot be read from the hub" in said and "--include-path" in said
