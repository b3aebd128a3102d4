"""The page and the figure of ``compare_methods``: each method's best, the learning rates it was tried with, a graph."""

import math
from collections.abc import Iterable
from typing import Any

from benchmarks.measuring import ROOT, publish
from benchmarks.methods import METHODS
from benchmarks.models import MODELS, BenchmarkModel

__all__ = ["best_rows", "in_order", "percent", "steps_of", "write_page"]

Row = dict[str, Any]
_COLUMNS = ("model", "method", "sparsity", "lr", "seed", "steps", "minutes", "zeros")
# The graph ends at so many times the dense model's perplexity: magnitude pruning goes to tens of millions.
_HIGHEST = 300


def best_rows(rows: Iterable[Row]) -> list[Row]:
    """Of one method's rows at one sparsity, those of its best learning rate with the first seed: one a seed."""
    latest = {(row["lr"], row["seed"]): row for row in rows}
    first = min(seed for _, seed in latest)
    best = min((row for (_, seed), row in latest.items() if seed == first), key=_badness)["lr"]
    return [row for (lr, _), row in sorted(latest.items(), key=lambda item: item[0][1]) if lr == best]


def write_page(rows: list[Row]) -> None:
    """Write docs/results/compare_methods.md and .svg from the last row of each measurement."""
    lines = [
        "# Methods compared",
        "",
        "Perplexity on held-out text; in brackets, minutes, of runs that shared two CPU cores with others, not all of "
        "the same machine: they computed in bf16 or in fp32, as the processor multiplies. "
        "Every method sees as many tokens of the "
        "same documents. Those that train with a learning rate of their own were run with several (listed below), and "
        "the best counts, marked `<` or `>` where it is the smallest or largest that was tried; ELSA has its defaults. "
        "Where there are several seeds, mean and half the range.",
        "",
        "`python -m benchmarks.compare_methods` (or `make benchmarks`) prints and writes this.",
        "",
        "![perplexity against sparsity](compare_methods.svg)",
    ]
    models = [model for model in MODELS.values() if any(row["model"] == model.name for row in rows)]
    for model in models:
        own = [row for row in rows if row["model"] == model.name]
        lines += _tables(model, [row for row in own if steps_of(row) == model.steps])
        lines += _lengths(model, own)
    publish("compare_methods", lines)
    _draw(models, rows)


def _tables(model: BenchmarkModel, rows: list[Row]) -> list[str]:
    sparsities = in_order({row["sparsity"] for row in rows} - {0.0})
    dense = [row for row in rows if row["method"] == "dense"][-1]
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    tokens = model.calibration_samples * model.sequence_length
    lines = [
        "",
        f"## {model.title}",
        "",
        f"{tokens:,} tokens of {model.text}: {model.steps} steps of {model.batch_size} x {model.sequence_length}, or "
        f"{model.calibration_samples} calibration samples. Perplexity on {' / '.join(_titles(dense))}; dense "
        f"{_perplexities([dense])}.",
        "",
        "| method | " + " | ".join(map(percent, sparsities)) + " |",
        "|---" * (len(sparsities) + 1) + "|",
    ]
    tuned = []
    for method in methods:
        cells = []
        for sparsity in sparsities:
            here = [row for row in rows if (row["method"], row["sparsity"]) == (method, sparsity)]
            cells.append(_cell(here) if here else "")
            if here and METHODS[method].tuned:
                tuned.append(f"| {method} | {percent(sparsity)} | {_tried(here)} |")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    if tuned:
        lines += ["", "| method | sparsity | learning rate: perplexity |", "|---|---|---|", *tuned]
    return lines


def _lengths(model: BenchmarkModel, rows: list[Row]) -> list[str]:
    """Perplexity against the tokens of a run, for the sparsities that there are runs of other lengths at."""
    lines = []
    longer = {row["sparsity"] for row in rows if steps_of(row) != model.steps} - {0.0}
    for sparsity in in_order(longer):
        here = [row for row in rows if row["sparsity"] == sparsity]
        lengths = sorted({steps_of(row) for row in here})
        tokens = [f"{steps * model.batch_size * model.sequence_length:,}" for steps in lengths]
        lines += ["", f"{model.title}, {percent(sparsity)}, by the tokens of a run:", ""]
        lines += ["| method | " + " | ".join(tokens) + " |", "|---" * (len(lengths) + 1) + "|"]
        for method in METHODS:
            of_method = [[r for r in here if r["method"] == method and steps_of(r) == steps] for steps in lengths]
            # A method of one length only has no place in a table of lengths.
            if sum(map(bool, of_method)) > 1:
                lines.append(f"| {method} | " + " | ".join(_cell(own) if own else "" for own in of_method) + " |")
    return lines


def steps_of(row: Row) -> int:
    """Of the run that a row is of."""
    steps: int = row.get("steps", MODELS[row["model"]].steps)
    return steps


def _cell(rows: list[Row]) -> str:
    best = best_rows(rows)
    lrs = sorted({row["lr"] for row in rows if row["lr"] is not None})
    edge = ""
    if len(lrs) > 1:
        edge = {lrs[0]: " <", lrs[-1]: " >"}.get(best[0]["lr"], "")
    minutes = sum(row["minutes"] for row in best) / len(best)
    return f"{_perplexities(best)} ({minutes:.1f}){edge}"


def _tried(rows: list[Row]) -> str:
    first = min(row["seed"] for row in rows)
    latest = {row["lr"]: row for row in rows if row["seed"] == first}
    return "; ".join(f"{lr:g}: {_perplexities([latest[lr]])}" for lr in sorted(latest))


def _perplexities(rows: list[Row]) -> str:
    """Of each text: one number, or mean and half the range."""
    texts = []
    for title in _titles(rows[0]):
        values = [row[title] for row in rows]
        mean = sum(values) / len(values)
        digits = 2 if mean < 30 else 1
        spread = f" ± {(max(values) - min(values)) / 2:,.{digits}f}" if len(values) > 1 else ""
        texts.append(f"{mean:,.{digits}f}{spread}")
    return " / ".join(texts)


def _titles(row: Row) -> list[str]:
    return [column for column in row if column not in _COLUMNS]


def _badness(row: Row) -> float:
    return sum(math.log(row[title]) for title in _titles(row))


def in_order(sparsities: Iterable[float | str]) -> list[float | str]:
    """Fractions, then structures."""
    return sorted(sparsities, key=lambda s: (isinstance(s, str), s))


def percent(sparsity: float | str) -> str:
    """A sparsity as pages write it."""
    return sparsity if isinstance(sparsity, str) else f"{sparsity:.0%}"


def _draw(models: list[BenchmarkModel], rows: list[Row]) -> None:
    import matplotlib
    from cycler import cycler
    from matplotlib import colormaps, pyplot

    # The same rows give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "compare_methods"
    matplotlib.rcParams["axes.prop_cycle"] = cycler(color=colormaps["tab20"](range(20)))
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(5 * len(models), 4.5), layout="constrained", squeeze=False
    )
    for axes, model in zip(panels[0], models, strict=True):
        own = [row for row in rows if row["model"] == model.name and steps_of(row) == model.steps]
        dense = [row for row in own if row["method"] == "dense"][-1]
        title = _titles(dense)[0]
        for number, name in enumerate(METHODS):
            points = {}
            for sparsity in sorted({row["sparsity"] for row in own if isinstance(row["sparsity"], float)}):
                here = [row for row in own if (row["method"], row["sparsity"]) == (name, sparsity)]
                if here:
                    best = best_rows(here)
                    points[sparsity] = sum(row[title] for row in best) / len(best)
            color, width = ("black", 2.5) if name == "ELSA" else (f"C{number}", 1.2)
            if points:
                axes.plot(list(points), list(points.values()), color, marker="o", label=name, linewidth=width)
        axes.axhline(dense[title], color="gray", linestyle=":", label="dense")
        axes.set(yscale="log", xlabel="sparsity", ylabel=f"perplexity, {title}", title=model.title)
        axes.set_ylim(dense[title] * 0.9, dense[title] * _HIGHEST)
        axes.grid(alpha=0.3, which="both")
    lines = {line.get_label(): line for axes in panels[0] for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside right", fontsize="small")
    figure.savefig(ROOT / "docs" / "results" / "compare_methods.svg", metadata={"Date": None})
    pyplot.close(figure)
