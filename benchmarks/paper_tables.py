"""SmolLM2 in the layout of arXiv 2510.01650's tables 6 to 8: for each sparsity the methods, their perplexities, and the
accuracy on seven zero-shot tasks.

Measures nothing: it puts together what ``benchmarks.compare_methods`` and ``benchmarks.zero_shot`` have measured, and
leaves empty what they have not. Zero-shot rows are those of the dense model and of the directories that
``benchmarks.pruned`` makes. Writes ``docs/results/paper_tables.md``.
"""

from typing import Any

from benchmarks.comparison_page import best_rows, in_order, percent, steps_of
from benchmarks.measuring import publish, read_rows
from benchmarks.methods import METHODS
from benchmarks.models import SMOLLM2
from benchmarks.zero_shot import TASKS, accuracies

Row = dict[str, Any]
_TEXTS = ("Wikipedia", "C4")


def page(compared: list[Row], zero_shot: list[Row], *, dense_directory: str) -> list[str]:
    """The page's lines.

    :param compared: rows of ``compare_methods``
    :param zero_shot: rows of ``zero_shot``, of which those with the most questions count
    :param dense_directory: what the dense model is called there
    """
    own = [row for row in compared if row["model"] == SMOLLM2.name and steps_of(row) == SMOLLM2.steps]
    questions = max((row["limit"] for row in zero_shot), default=0)
    accuracy = {(row["directory"], row["task"]): row for row in zero_shot if row["limit"] == questions}
    columns = ["sparsity", "method", *_TEXTS, *(title for title, _ in TASKS.values()), "mean"]
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
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for sparsity in in_order({row["sparsity"] for row in own}):
        for method in ["dense", *METHODS]:
            rows = [row for row in own if (row["method"], row["sparsity"]) == (method, sparsity)]
            if not rows:
                continue
            directory = dense_directory if method == "dense" else None
            if method == "ELSA" and isinstance(sparsity, float):
                directory = f"elsa-{round(100 * sparsity)}-{SMOLLM2.steps}"
            best = best_rows(rows)
            texts = [f"{sum(row[text] for row in best) / len(best):,.1f}" for text in _TEXTS]
            cells = [
                percent(sparsity),
                method,
                *texts,
                *accuracies([accuracy.get((directory, task)) for task in TASKS]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    publish(
        "paper_tables",
        page(read_rows("compare_methods"), read_rows("zero_shot"), dense_directory="SmolLM2-135M-Instruct"),
    )
