"""Perplexity against sparsity, drawn and written as a table."""

import importlib.util
from pathlib import Path

from elsa_modifier.evaluating.record import Evaluation
from elsa_modifier.sweeping.record import Sweep
from elsa_modifier.whole_files import write_whole

__all__ = ["can_draw", "draw", "page"]

# Okabe and Ito's, which colour-blind eyes tell apart, and markers for print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(sweep: Sweep, directory: Path) -> None:
    """``sweep.svg`` and ``sweep.png``: a line a text, on a logarithmic scale, and the dense model's as a dashed one."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "elsa", "font.size": 11}):
        from matplotlib.figure import Figure
        from matplotlib.ticker import ScalarFormatter

        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for i, text in enumerate(_texts(sweep)):
            colour = _COLOURS[i % len(_COLOURS)]
            found = [(100 * p.sparsity, value) for p in sweep.points if (value := _value(p.evaluation, text))]
            marker = _MARKERS[i % len(_MARKERS)]
            axes.plot(*zip(*found, strict=True), color=colour, marker=marker, label=text)
            if sweep.dense is not None and (dense := _value(sweep.dense, text)):
                axes.axhline(dense, color=colour, linestyle="--", linewidth=1, label=f"{text}, dense")
        axes.set_yscale("log")
        formatter = ScalarFormatter()
        formatter.set_scientific(False)
        axes.yaxis.set_major_formatter(formatter)
        axes.yaxis.set_minor_formatter(formatter)
        axes.tick_params(axis="y", which="minor", labelsize=8)
        axes.set_xlabel("sparsity, %")
        axes.set_ylabel("perplexity")
        axes.set_title(Path(sweep.model).name)
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        axes.legend(fontsize=9)
        for suffix, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 200})):
            partial = directory / f".sweep.partial.{suffix}"
            figure.savefig(partial, **options)
            partial.replace(directory / f"sweep.{suffix}")


def page(sweep: Sweep, directory: Path) -> None:
    """``sweep.md``: the same numbers, and those of tasks."""
    texts = _texts(sweep)
    evaluated = [("dense", sweep.dense), *((f"{100 * p.sparsity:g}%", p.evaluation) for p in sweep.points)]
    tasks = list(dict.fromkeys((t.task, t.metric) for _, e in evaluated if e for t in e.tasks))
    heads = ["sparsity", *texts, *(f"{text}, KL from dense" for text in texts), *map(", ".join, tasks)]
    lines = [f"# {Path(sweep.model).name}: perplexity against sparsity", ""]
    if (directory / "sweep.svg").exists():
        lines += ["![perplexity against sparsity](sweep.svg)", ""]
    lines += ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name, evaluation in evaluated:
        if evaluation is None:
            continue
        cells = [f"{value:,.2f}" if (value := _value(evaluation, text)) else "" for text in texts]
        kl = {same.text: same.kl for same in evaluation.agreement}
        cells += [f"{kl[text]:.4f}" if text in kl else "" for text in texts]
        results = {(t.task, t.metric): t for t in evaluation.tasks}
        for task in tasks:
            found = results.get(task)
            error = f" ± {found.stderr:.4f}" if found and found.stderr is not None else ""
            cells.append(f"{found.value:.4f}{error}" if found else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    write_whole(directory / "sweep.md", "\n".join(lines) + "\n")


def _texts(sweep: Sweep) -> list[str]:
    return list(dict.fromkeys(found.text for point in sweep.points for found in point.evaluation.perplexity))


def _value(evaluation: Evaluation, text: str) -> float | None:
    return next((found.value for found in evaluation.perplexity if found.text == text), None)
