"""Tasks of lm-eval, zero-shot and others, with their standard errors. lm-eval is imported when it is asked for."""

import importlib.metadata
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsa_modifier.evaluating.record import TaskResult
from elsa_sparse.errors import printable

__all__ = [
    "PAPER_TASKS",
    "TaskSettings",
    "check_tasks",
    "lm_eval_version",
    "measure_tasks",
    "on_server",
    "on_transformers",
]

PAPER_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande")
"""The seven zero-shot tasks of the paper, by lm-eval's names."""

_PAPER = "paper"


@dataclass(frozen=True)
class TaskSettings:
    """What is asked.

    :param names: tasks, groups and tags as lm-eval names them; ``paper`` is :data:`PAPER_TASKS`
    :param limit: questions of a task, at most; None for all
    :param fewshot: examples that are shown before a question; None for what the task says
    :param include: a directory of more tasks, in lm-eval's YAML
    """

    names: tuple[str, ...]
    limit: int | None = None
    fewshot: int | None = None
    include: Path | None = None

    @property
    def expanded(self) -> list[str]:
        """Names that lm-eval knows, each once."""
        names = [name for given in self.names for name in (PAPER_TASKS if given == _PAPER else (given,))]
        return list(dict.fromkeys(names))


def lm_eval_version() -> str | None:
    """The version that is installed, if one is."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_tasks(settings: TaskSettings) -> None:
    """Refuse names that lm-eval does not know, before a model is loaded.

    :raises ImportError: if lm-eval is not installed
    :raises ValueError: names the tasks, and what they are like
    """
    if lm_eval_version() is None:
        raise ImportError("tasks need the package lm-eval, which is not installed: `pip install 'elsa-modifier[eval]'`")
    known = _manager(settings).all_tasks
    for name in settings.expanded:
        if name not in known:
            near = get_close_matches(name, known)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(
                f"tasks: lm-eval knows no task {printable(name, 100)!r}; {hint}`lm_eval ls tasks` lists all; paper is "
                f"short for {', '.join(PAPER_TASKS)}"
            )


def on_transformers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> Any:
    """A model as lm-eval's ``--model hf`` has it."""
    from lm_eval.models.huggingface import HFLM, eval_logger

    level = eval_logger.level
    eval_logger.setLevel(logging.ERROR)  # it warns that the model is loaded already
    try:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        eval_logger.setLevel(level)


def on_server(address: str, name: str, tokenizer: str, *, length: int | None, batch_size: int) -> Any:
    """A running server as lm-eval's ``--model local-completions`` has it.

    :param address: of its OpenAI API, without ``/v1``
    :param name: of the model there
    :param tokenizer: directory or name of the model's
    :param length: tokens that it takes
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{address}/v1/completions",
        model=name,
        tokenizer=tokenizer,
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        batch_size=batch_size,
        **({} if length is None else {"max_length": length}),
    )


def measure_tasks(model: Any, settings: TaskSettings) -> tuple[TaskResult, ...]:
    """What lm-eval's ``simple_evaluate`` finds, one result a metric.

    :param model: see :func:`on_transformers`, :func:`on_server`
    :raises ValueError: if lm-eval fails, most often because a task's questions cannot be read from the hub
    """
    from lm_eval import simple_evaluate

    try:
        found: Mapping[str, Any] = simple_evaluate(
            model=model,
            tasks=settings.expanded,
            num_fewshot=settings.fewshot,
            limit=settings.limit,
            log_samples=False,
            task_manager=_manager(settings),
        )
    except ConnectionError as error:
        raise ValueError(
            f"tasks: questions cannot be read from the hub ({printable(error, 200)}). Where there is none, take tasks "
            "that read local files: --include-path DIR"
        ) from error
    return tuple(
        result for task, values in found["results"].items() for result in _results(task, values, found, settings.limit)
    )


def _manager(settings: TaskSettings) -> Any:
    """lm-eval's index of tasks: of the user's own alone if those are all, as reading its thousands takes a while."""
    if settings.include is not None:
        own = _index(settings.include, defaults=False)
        if set(settings.expanded) <= set(own.all_tasks):
            return own
    return _index(settings.include, defaults=True)


@lru_cache(maxsize=2)
def _index(include: Path | None, *, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include is None else str(include), include_defaults=defaults)


def _results(task: str, values: Mapping[str, Any], found: Mapping[str, Any], limit: int | None) -> Sequence[TaskResult]:
    results = []
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if filtered == "none" else key
        if not math.isfinite(value):
            logger.warning(f"{task}: {name} is {value}, and is left out.")
            continue
        stderr: Any = values.get(f"{metric}_stderr,{filtered}")
        known = isinstance(stderr, int | float) and math.isfinite(stderr)
        results.append(
            TaskResult(
                task=task,
                metric=name,
                value=float(value),
                stderr=float(stderr) if known else None,
                limit=limit,
                samples=found["n-samples"].get(task, {}).get("effective"),
                fewshot=found["n-shot"].get(task),
            )
        )
    return results
