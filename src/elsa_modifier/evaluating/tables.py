"""Evaluations side by side: what a terminal and a Markdown page show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from elsa_modifier.evaluating.record import Evaluation

__all__ = ["Table", "markdown", "table_of"]


@dataclass(frozen=True)
class Table:
    """Text in rows.

    :param columns: headings; the first is of what is measured, one for each model follows
    :param rows: as many cells each
    :param notes: sentences below
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def table_of(evaluations: Sequence[Evaluation]) -> Table:
    """What was measured in rows, models in columns; the dense model first, where it was measured along."""
    names = _short_names(evaluations)
    dense = next((evaluation.dense for evaluation in evaluations if evaluation.agreement), None)
    rows: dict[str, list[str]] = {}

    def fill(label: str, column: int, cell: str) -> None:
        rows.setdefault(label, [""] * (1 + len(evaluations)))[column] = cell

    for column, evaluation in enumerate(evaluations, 1):
        for found in evaluation.perplexity:
            fill(f"{found.text}, perplexity", column, f"{found.value:,.2f}")
            if found.dense is not None and evaluation.dense == dense:
                fill(f"{found.text}, perplexity", 0, f"{found.dense:,.2f}")
    for column, evaluation in enumerate(evaluations, 1):
        for same in evaluation.agreement:
            fill(f"{same.text}, same first choice", column, f"{same.top1:.2%}")
            fill(f"{same.text}, KL from dense", column, f"{same.kl:.4f}")
    for column, evaluation in enumerate(evaluations, 1):
        for result in evaluation.tasks:
            error = "" if result.stderr is None else f" ± {result.stderr:.4f}"
            fill(f"{result.task}, {result.metric}", column, f"{result.value:.4f}{error}")
    cells = [(label, *values) for label, values in rows.items()]
    columns = ("", "dense" if dense is None else f"dense: {_short(dense)}", *names)
    if dense is None:
        cells = [(row[0], *row[2:]) for row in cells]
        columns = (columns[0], *columns[2:])
    return Table(columns, tuple(cells), _notes(evaluations))


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """A table and what it says below, for a page."""
    table = table_of(evaluations)
    escape: Callable[[str], str] = lambda cell: cell.replace("|", "\\|")  # noqa: E731
    lines = ["| " + " | ".join(map(escape, table.columns)) + " |", "|---" + "|---:" * (len(table.columns) - 1) + "|"]
    lines += ["| " + " | ".join(map(escape, row)) + " |" for row in table.rows]
    return "\n".join([*lines, "", *(f"{note}\n" for note in table.notes)])


def _notes(evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    first = evaluations[0]
    notes = []
    texts = {(found.text, found.tokens, found.window) for e in evaluations for found in e.perplexity}
    if texts:
        told = "; ".join(
            f"{text}: {tokens:,} tokens in windows of {window:,}" for text, tokens, window in sorted(texts)
        )
        notes.append(f"Perplexity: {told}.")
    if first.agreement:
        notes.append("KL: of the dense model's distribution to the model's over the full vocabulary, nats a token.")
    if first.tasks:
        limits = {f"the first {r.limit:,}" if r.limit else "all" for e in evaluations for r in e.tasks}
        notes.append(
            f"Tasks: lm-eval {first.made.get('lm_eval')}, ± standard error; {' and '.join(sorted(limits))} questions."
        )
    engines = {e.engine + (f", {e.dtype}" if e.dtype else "") for e in evaluations}
    notes.append(f"Computed by {' and '.join(sorted(engines))}.")
    return tuple(notes)


def _short_names(evaluations: Sequence[Evaluation]) -> list[str]:
    """The last part of each name, or all of it where that is the same for two."""
    short = [_short(evaluation.model) for evaluation in evaluations]
    return [e.model if short.count(s) > 1 else s for e, s in zip(evaluations, short, strict=True)]


def _short(model: str) -> str:
    return Path(model).name or model
