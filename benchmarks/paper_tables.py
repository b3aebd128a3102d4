"""SmolLM2 in the layout of arXiv 2510.01650's tables 6 to 8: for each sparsity the methods, their perplexities, and the
accuracy on seven zero-shot tasks.

Measures nothing: it puts together what ``benchmarks.compare_methods`` and ``benchmarks.zero_shot`` have measured, and
leaves empty what they have not. Zero-shot rows are those of the dense model and of the directories that
``benchmarks.pruned`` makes. Writes ``docs/results/paper_tables.md``.
"""

from typing import Any

from benchmarks.comparison_page import best_rows
from benchmarks.measuring import publish, read_rows
from benchmarks.methods import METHODS
from benchmarks.models import SMOLLM2
from benchmarks.zero_shot import TASKS

Row = dict[str, Any]
_TEXTS = ("Wikipedia", "C4")


def page(compared: list[Row], zero_shot: list[Row], *, dense_directory: str) -> list[str]:
    """The page's lines.

    :param compared: rows of ``compare_methods``
    :param zero_shot: rows of ``zero_shot``, of which those with the most questions count
    :param dense_directory: what the dense model is called there
    """
    own = [r for r in compared if r["model"] == SMOLLM2.name and r.get("steps", SMOLLM2.steps) == SMOLLM2.steps]
    questions = max((row["limit"] for row in zero_shot), default=0)
    accuracy = {(row["directory"], row["task"]): row for row in zero_shot if row["limit"] == questions}
    lines = [
        "# SmolLM2-135M as the paper has its models",
        "",
        "Perplexity on held-out text, and accuracy in percent ± its standard error on the first "
        f"{questions} questions of seven zero-shot tasks, in the layout of arXiv 2510.01650's tables 6 to 8. The "
        "budget is 65,536 tokens, a thousandth of the paper's. What is empty has not been measured.",
        "",
        "`python -m benchmarks.paper_tables` prints and writes this, from the rows of "
        "[compare_methods.md](compare_methods.md) and `benchmarks.zero_shot`.",
        "",
        f"| sparsity | method | {' | '.join(_TEXTS)} | {' | '.join(title for title, _ in TASKS.values())} | mean |",
        "|---" * (4 + len(_TEXTS) - 1 + len(TASKS)) + "|",
    ]
    sparsities = sorted({row["sparsity"] for row in own}, key=lambda s: (isinstance(s, str), s))
    for sparsity in sparsities:
        for method in ["dense", *METHODS]:
            rows = [row for row in own if (row["method"], row["sparsity"]) == (method, sparsity)]
            if not rows:
                continue
            directory = dense_directory if method == "dense" else None
            if method == "ELSA" and isinstance(sparsity, float):
                directory = f"elsa-{round(100 * sparsity)}-{SMOLLM2.steps}"
            name = sparsity if isinstance(sparsity, str) else f"{sparsity:.0%}"
            best = best_rows(rows)
            texts = [f"{sum(row[text] for row in best) / len(best):,.1f}" for text in _TEXTS]
            cells = [name, method, *texts, *_accuracies([accuracy.get((directory, task)) for task in TASKS])]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _accuracies(found: list[Row | None]) -> list[str]:
    """A cell for each task, and their mean if all are there."""
    cells = [f"{100 * r['accuracy']:.1f} ± {100 * r['error']:.1f}" if r else "" for r in found]
    known = [r for r in found if r]
    if len(known) < len(found):
        return [*cells, ""]
    mean = sum(r["accuracy"] for r in known) / len(known)
    error = sum(r["error"] ** 2 for r in known) ** 0.5 / len(known)
    return [*cells, f"{100 * mean:.1f} ± {100 * error:.1f}"]


if __name__ == "__main__":
    publish(
        "paper_tables",
        page(read_rows("compare_methods"), read_rows("zero_shot"), dense_directory="SmolLM2-135M-Instruct"),
    )
