"""The model card of a pruned model: a report's facts in Markdown, with the metadata of Hugging Face's hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from elsa_modifier.evaluating.record import TaskResult
from elsa_modifier.reporting.facts import Facts
from elsa_modifier.reporting.page import perplexities
from elsa_modifier.reporting.words import bytes_in_words, duration, number, percent
from elsa_modifier.whole_files import write_whole
from elsa_sparse.errors import printable
from elsa_sparse.model_card import CARD_FILE, REPORT_MARK, is_reported
from elsa_sparse.owned import owned_files, still_is

__all__ = ["build_card", "write_card"]

_METRICS = {"acc": "accuracy", "exact_match": "exact_match", "word_perplexity": "perplexity"}


def write_card(facts: Facts, base_model: str | None = None) -> bool:
    """Write ``README.md``, unless somebody else wrote the one that is there.

    :param base_model: see :func:`build_card`
    :returns: whether it was written
    """
    file = facts.directory / CARD_FILE
    if file.exists() and not _is_ours(facts.directory, file):
        return False
    write_whole(file, build_card(facts, base_model))
    return True


def _is_ours(directory: Path, file: Path) -> bool:
    return is_reported(file) or still_is(directory, CARD_FILE, (owned_files(directory) or {}).get(CARD_FILE))


def build_card(facts: Facts, base_model: str | None = None) -> str:
    """Markdown, with metadata before it.

    :param base_model: name of the dense model on the hub; None is what the run was given, if that came from the hub
    :raises ValueError: if ``base_model`` cannot be such a name
    """
    if base_model is not None and not _is_name(base_model):
        raise ValueError(f"base-model is {base_model!r}; a name on the hub has the form organization/name")
    summary = facts.summary
    if base_model is None and summary is not None and summary.base_on_hub and _is_name(summary.base or ""):
        base_model = summary.base
    dataset = summary.data.partition(":")[0] if summary is not None and summary.data and summary.data_on_hub else None
    results = _results(facts)
    name = re.sub(r"[^\w.-]+", "-", facts.name).strip("-.") or "model"
    data = ModelCardData(
        base_model=base_model,
        datasets=[dataset] if dataset and _is_name(dataset) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparse", "pruned", "elsa", "elsa-modifier", "arxiv:2510.01650"],
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
        model_name=name if results else None,
    )
    parts = [f"---\n{data.to_yaml()}\n---", REPORT_MARK, f"# {_text(facts.name)}", _opening(facts, base_model)]
    parts += [*_quality(facts), *_making(facts), *_using(facts)]
    return "\n\n".join(parts) + "\n"


def _is_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _results(facts: Facts) -> list[EvalResult]:
    results = []
    if facts.evaluation is not None:
        for measured in facts.evaluation.perplexity:
            text = printable(measured.text, 60)
            arguments = {"window": measured.window, "tokens": measured.tokens}
            results.append(_result(text, "perplexity", "perplexity", measured.value) | {"metric_args": arguments})
        for task in facts.evaluation.tasks:
            metric = task.metric.partition(",")[0]
            shots = {} if task.fewshot is None else {"dataset_args": {"num_few_shot": task.fewshot}}
            kind = _METRICS.get(metric, metric)
            results.append(_result(printable(task.task, 60), kind, _metric(task), task.value) | shots)
    return [EvalResult(**result) for result in results]


def _result(dataset: str, metric: str, metric_name: str, value: float) -> dict[str, Any]:
    return {
        "task_type": "text-generation",
        "dataset_type": re.sub(r"\W+", "-", dataset.lower()).strip("-") or "text",
        "dataset_name": dataset,
        "metric_type": metric,
        "metric_name": metric_name,
        "metric_value": round(value, 4),
    }


def _metric(task: TaskResult) -> str:
    return printable(task.metric, 40)


def _opening(facts: Facts, base_model: str | None) -> str:
    pruned = facts.pruned
    what = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else facts.architecture or "A model"
    lines = [
        f"{what}, pruned to {percent(facts.sparsity)} zeros in {len(pruned)} matrices of its layers by ELSA "
        "([arXiv 2510.01650](https://arxiv.org/abs/2510.01650)), with elsa-modifier."
    ]
    total = facts.total
    if total.stored_bytes < total.dense_bytes:
        stored, dense = map(bytes_in_words, (total.stored_bytes, total.dense_bytes))
        lines.append(f"Stored in {stored}; dense it takes {dense}.")
    return " ".join(lines)


def _quality(facts: Facts) -> list[str]:
    parts = []
    measured = perplexities(facts)
    if measured:
        rows = [[_text(t), "" if dense is None else number(dense), number(value)] for t, dense, value in measured]
        parts += ["## How good", _table(["perplexity", "dense", "pruned"], rows)]
    evaluation = facts.evaluation
    if evaluation is not None and evaluation.agreement:
        parts += [
            "\n".join(
                f"- {_text(printable(a.text, 60))}: the same most likely token as the dense model in {a.top1:.1%} of "
                f"places; KL divergence {a.kl:.3g} nats."
                for a in evaluation.agreement
            )
        ]
    if evaluation is not None and evaluation.tasks:
        rows = [
            [
                _text(printable(task.task, 40)),
                _text(_metric(task)),
                f"{task.value:.4f}" + (f" ± {task.stderr:.4f}" if task.stderr is not None else ""),
                "all" if task.limit is None else f"{task.limit:,}",
            ]
            for task in evaluation.tasks
        ]
        parts += [] if measured else ["## How good"]
        parts.append(_table(["task", "metric", "value", "questions"], rows))
    return parts


def _making(facts: Facts) -> list[str]:
    parts = ["## How it was made"]
    summary, lines = facts.summary, []
    if summary is not None and summary.data:
        # Where a text lay on somebody's disk says nothing to others.
        data = summary.data if summary.data_on_hub else Path(summary.data).name
        lines.append(f"- Text: {_text(printable(data, 100))}")
    if facts.steps:
        lines.append(f"- {len(facts.steps):,} steps, {facts.tokens:,} tokens")
        lines.append(f"- Time of all steps: {duration(float(facts.steps[-1].get('seconds', 0)))}")
    if facts.unreached:
        lines.append(f"- {len(facts.unreached):,} modules stayed dense, as no text reached them")
    if facts.recipe is not None:
        lines.append("- `recipe.yaml` beside this file is the recipe, `elsa_history.json` loss and mask step by step")
    return [*parts, "\n".join(lines)] if lines else []


def _using(facts: Facts) -> list[str]:
    name = "this directory"
    if not facts.sparse:
        return ["## Use", "Any engine loads it as any other model: the zeros are stored like other weights."]
    return [
        "## Use",
        "```python\n"
        "import elsa_modifier  # teaches transformers the format\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        "```",
        "With elsa-modifier installed beside vLLM, `vllm serve` takes the directory as it is. `elsa unpack` turns it "
        "into plain safetensors for any other engine; `elsa inspect` lists its tensors.",
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """Text out of a file, of which Markdown and HTML make nothing."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", printable(text, 200))
