"""The figures of a report: of the run, of where the zeros are, and of what was measured afterwards."""

from collections.abc import Mapping, Sequence
from typing import Any

from elsa_modifier.admm.constraint import SparsitySchedule
from elsa_modifier.reporting.drawing import INK, LINES, PAPER, SERIES, Canvas, Drawing, canvas
from elsa_modifier.reporting.facts import Facts
from elsa_modifier.reporting.words import bytes_in_words

__all__ = [
    "draw_budget",
    "draw_layers",
    "draw_perplexity",
    "draw_run",
    "draw_sizes",
    "draw_speed",
    "draw_zero_shot",
]

_ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
_MANY = 60  # points of a line that has markers no more


def draw_run(facts: Facts) -> list[Drawing]:
    """Loss, residual, penalty, learning rate, mask change and sparsity over the steps, as far as there are records."""
    drawings = [_of_steps(facts, *figure) for figure in _OVER_STEPS]
    drawings += [_mask_change(facts), _sparsity(facts)]
    return [drawing for drawing in drawings if drawing is not None]


_OVER_STEPS = (
    ("loss", "Loss", "Objective before each step, nats a token", "nats", "loss", False),
    (
        "residual",
        "Residual",
        "How far the weights are from their sparse copy, ||x - z|| / ||x||, before each update of the mask",
        "||x - z|| / ||x||",
        "residual",
        False,
    ),
    ("penalty", "Penalty", "Pull towards the sparse copy; 0 once the mask is fixed", "penalty", "penalty", True),
    ("learning_rate", "Learning rate", "Of the base optimizer", "rate", "learning_rate", True),
)


def _of_steps(facts: Facts, name: str, title: str, caption: str, label: str, field: str, steps: bool) -> Drawing | None:
    points = [(step["step"], step[field]) for step in facts.steps if field in step]
    if not points:
        return None
    first, last = points[0][1], points[-1][1]
    with canvas(name, title, f"{caption}: from {first:.3g} to {last:.3g}.") as drawn:
        _line(drawn, points, 0, drawstyle="steps-post" if steps else "default")
        drawn.axes.set(xlabel="step", ylabel=label)
        if steps:
            drawn.axes.set_ylim(bottom=0)
            drawn.axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
        _steps_axis(drawn, facts)
    return drawn.drawing


def _mask_change(facts: Facts) -> Drawing | None:
    kept = sum(m.weights * (1 - m.sparsity) for m in facts.pruned)
    points = [
        (step["step"], 100 * step["mask_entered"] / kept) for step in facts.steps if kept and "mask_entered" in step
    ]
    if not points:
        return None
    total = sum(value for _, value in points)
    caption = (
        f"Weights that came back into the mask in each update, % of those kept at the end: {total:.3g}% in all "
        f"{len(points)} updates."
    )
    with canvas("mask_change", "Mask change", caption) as drawn:
        _line(drawn, points, 1)
        drawn.axes.set(xlabel="step", ylabel="% of kept weights")
        drawn.axes.set_ylim(bottom=0)
        _steps_axis(drawn, facts)
    return drawn.drawing


def _sparsity(facts: Facts) -> Drawing | None:
    if not facts.steps:
        return None
    held = [(step["step"], 100 * step.get("sparsity", 0)) for step in facts.steps]
    schedule = facts.fields.get("sparsity_schedule")
    end = max(100 * facts.sparsity, held[-1][1])
    asked: list[tuple[float, float]] = []
    if isinstance(schedule, Mapping) and schedule.get("name") in ("constant", "linear", "cubic"):
        last = len(facts.steps) if "steps" not in facts.fields else int(facts.fields["steps"])
        wanted = SparsitySchedule(schedule["name"], round(float(schedule.get("end", 0)) * last))
        asked = [(step["step"], end * wanted(step["step"])) for step in facts.steps]
    fixed = next((step for step, value in held if value), None)
    caption = "Zeros that the weights are pulled to, and that they are held to"
    caption += f" from step {fixed} on: {held[-1][1]:.4g}%." if fixed else "; the mask was never fixed."
    with canvas("sparsity", "Sparsity", caption) as drawn:
        if asked:
            _line(drawn, asked, 1, label="pulled to")
        _line(drawn, held, 0, label="held to", drawstyle="steps-post")
        drawn.axes.set(xlabel="step", ylabel="% zeros", ylim=(-3, 103))
        _steps_axis(drawn, facts)
        _legend_above(drawn)
    return drawn.drawing


def draw_layers(facts: Facts) -> Drawing | None:
    """Sparsity of each matrix: layers down, kinds across."""
    matrices = facts.pruned
    if not matrices:
        return None
    layers = sorted({m.layer for m in matrices})
    kinds = sorted(dict.fromkeys(m.kind for m in matrices), key=_place)
    lowest, highest = (choose(m.sparsity for m in matrices) for choose in (min, max))
    least = min(matrices, key=lambda m: m.sparsity)
    caption = (
        f"Zeros in each of {len(matrices)} matrices: {lowest:.1%} to {highest:.1%}. The densest is {least.kind} of "
        f"layer {least.layer}."
    )
    values = {(m.layer, m.kind): 100 * m.sparsity for m in matrices}
    height = min(900, 110 + 11 * max(8, len(layers)))
    with canvas("layers", "Zeros by layer", caption, height=height) as drawn:
        grid = [[values.get((layer, kind), float("nan")) for kind in kinds] for layer in layers]
        narrow = highest - lowest < 0.01
        middle = 50 * (highest + lowest)
        limits = (middle - 1, middle + 1) if narrow else (100 * lowest, 100 * highest)
        mesh = drawn.axes.pcolormesh(grid, cmap="cividis", vmin=limits[0], vmax=limits[1])
        every = max(1, -(-len(layers) // 15))
        drawn.axes.set_yticks([i + 0.5 for i in range(0, len(layers), every)], layers[::every])
        names = [kind.rpartition(".")[2].removesuffix("_proj") for kind in kinds]
        drawn.axes.set_xticks([i + 0.5 for i in range(len(kinds))], names, rotation=45 if len(kinds) > 4 else 0)
        drawn.axes.set(ylabel="layer")
        drawn.axes.invert_yaxis()
        drawn.axes.tick_params(length=0)
        bar = drawn.axes.figure.colorbar(mesh, ax=drawn.axes, label="% zeros", pad=0.02)
        bar.outline.set_visible(False)
    return drawn.drawing


def draw_budget(facts: Facts) -> Drawing | None:
    """Where a shared budget went: what each layer keeps of what it would with the same sparsity everywhere."""
    matrices = facts.pruned
    layers = sorted({m.layer for m in matrices})
    if len(layers) < 2 or facts.fields.get("shared_budget") is False:
        return None
    even = 1 - facts.sparsity
    groups = list(dict.fromkeys(m.kind.partition(".")[0] for m in matrices))[: len(SERIES)]
    lines: dict[str, list[tuple[float, float]]] = {}
    for group in groups:
        for layer in layers:
            own = [m for m in matrices if m.layer == layer and m.kind.partition(".")[0] == group]
            if own:
                size = sum(m.weights for m in own)
                kept = sum(m.weights * (1 - m.sparsity) for m in own)
                lines.setdefault(group, []).append((layer, kept / size / even))
    moved = sum(m.weights * abs(1 - m.sparsity - even) for m in matrices) / 2
    kept = sum(m.weights for m in matrices) * even
    if moved < 1e-4 * kept:
        return None
    caption = (
        f"Weights that a layer keeps, against an even share (1). One budget for all moved {moved / kept:.1%} of the "
        "kept weights between matrices."
    )
    with canvas("budget", "Where the budget went", caption, height=260) as drawn:
        drawn.axes.axhline(1, color=SERIES[2], linestyle=":", linewidth=1.4)
        for number, (group, points) in enumerate(lines.items()):
            _line(drawn, points, number, label=group)
        drawn.axes.set(xlabel="layer", ylabel="kept, of an even share")
        drawn.axes.set_ylim(bottom=0)
        drawn.axes.grid(axis="y")
        _integers(drawn.axes.xaxis)
        _legend_above(drawn)
    return drawn.drawing


def draw_perplexity(points: Mapping[str, Sequence[tuple[float, float]]], dense: Mapping[str, float]) -> Drawing | None:
    """Perplexity against sparsity, a line a text.

    :param points: (sparsity in %, perplexity), by text
    :param dense: perplexity of the dense model, by text
    """
    lines = {text: sorted(own) for text, own in points.items() if len(own) > 1}
    if not lines:
        return None
    values = "; ".join(
        f"{text}: " + ", ".join(f"{value:.4g} at {sparsity:.0f}%" for sparsity, value in own)
        for text, own in lines.items()
    )
    with canvas("perplexity", "Perplexity against sparsity", f"{values}.", height=260) as drawn:
        for number, (text, own) in enumerate(lines.items()):
            if text in dense:
                drawn.axes.axhline(dense[text], color=SERIES[number % len(SERIES)], linestyle=":", linewidth=1.2)
            _line(drawn, own, number, label=_short(text))
        drawn.axes.set(xlabel="% zeros", ylabel="perplexity")
        every = [value for own in lines.values() for _, value in own] + [dense[text] for text in lines if text in dense]
        if max(every) > 3 * min(every):
            _log_axis(drawn.axes)
        drawn.axes.grid(axis="y")
        _legend_above(drawn)
    return drawn.drawing


def draw_sizes(sizes: Mapping[str, int]) -> Drawing:
    """Bytes, a bar each.

    :param sizes: by what is that large
    """
    caption = "; ".join(f"{name}: {bytes_in_words(value)}" for name, value in sizes.items()) + "."
    with canvas("sizes", "Size", caption, height=70 + 38 * len(sizes)) as drawn:
        _bars(drawn, [(name, value / 1e6, bytes_in_words(value)) for name, value in sizes.items()], "MB")
    return drawn.drawing


def draw_speed(speeds: Sequence[Mapping[str, Any]]) -> Drawing:
    """Compressed over dense, a bar each, with the slowest and the fastest round."""
    rows = [(_work(speed), float(speed["ratio"]), f"{speed['ratio']:.2f}x") for speed in speeds]
    caption = "Tokens a second with compressed weights, against dense ones (1); thin lines span all rounds. "
    caption += "; ".join(f"{name} {label}" for name, _, label in rows) + "."
    with canvas("speed", "Speed", caption, height=80 + 38 * len(rows)) as drawn:
        spans = [(float(speed["slowest"]), float(speed["fastest"])) for speed in speeds]
        _bars(drawn, rows, "times dense", spans=spans, mark=1)
    return drawn.drawing


def draw_zero_shot(scores: Mapping[str, Mapping[str, tuple[float, float | None]]]) -> Drawing | None:
    """Scores with standard errors, a row a task, a marker a model.

    :param scores: (value, standard error) by task, by model
    """
    models = list(scores)[: len(SERIES)]
    tasks = list(dict.fromkeys(task for model in models for task in scores[model]))
    if not tasks:
        return None
    caption = "Scores; lines are one standard error to each side. "
    caption += (
        "; ".join(f"{task} {scores[models[0]][task][0]:.3f}" for task in tasks if task in scores[models[0]]) + "."
    )
    with canvas("zero_shot", "Zero-shot tasks", caption, height=90 + 30 * len(tasks)) as drawn:
        for number, model in enumerate(models):
            own = scores[model]
            here = [i for i, task in enumerate(tasks) if task in own]
            drawn.axes.errorbar(
                [own[tasks[i]][0] for i in here],
                [i + 0.16 * (number - (len(models) - 1) / 2) for i in here],
                xerr=[own[tasks[i]][1] or 0.0 for i in here],
                fmt=LINES[number][1],
                color=SERIES[number],
                label=_short(model),
            )
        drawn.axes.set_yticks(range(len(tasks)), [_short(task) for task in tasks])
        drawn.axes.invert_yaxis()
        drawn.axes.set_xlabel("score")
        drawn.axes.grid(axis="x")
        _legend_above(drawn)
    return drawn.drawing


def _place(kind: str) -> tuple[int, str]:
    """Where a matrix stands in a layer, by its usual name: attention first; others last, by name."""
    name = kind.rpartition(".")[2]
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), kind)


def _line(drawn: Canvas, points: Sequence[tuple[float, float]], number: int, **settings: Any) -> None:
    style, marker = LINES[number % len(LINES)]
    drawn.axes.plot(
        *zip(*points, strict=True),
        color=SERIES[number % len(SERIES)],
        linestyle=style,
        marker=marker if len(points) <= _MANY else "",
        **settings,
    )


def _bars(
    drawn: Canvas,
    rows: Sequence[tuple[str, float, str]],
    label: str,
    spans: Sequence[tuple[float, float]] | None = None,
    mark: float = 0.0,
) -> None:
    """Bars across, each with its name above and its value at its end.

    :param spans: lines under the bars
    :param mark: a line across each bar, if not 0
    """
    axes, largest = drawn.axes, max(value for _, value, _ in rows) or 1.0
    for i, (name, value, said) in enumerate(rows):
        axes.barh(i, value, height=0.42, color=SERIES[0])
        axes.annotate(_short(name, 48), (0, i - 0.25), xytext=(0, 1), textcoords="offset points", va="bottom")
        if spans is not None:
            axes.plot(spans[i], (i + 0.29, i + 0.29), color=INK, linewidth=1.4, marker="|", markersize=4)
        if mark:
            # Not through the names, which stand between the bars.
            axes.plot((mark, mark), (i - 0.21, i + 0.21), color=SERIES[1] if value < mark else PAPER, linewidth=1.6)
        axes.annotate(said, (max(value, mark), i), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set(xlabel=label, yticks=[], ylim=(len(rows) - 0.6, -0.75), xlim=(0, 1.2 * largest))
    if spans is not None:
        axes.set_xlim(0, 1.2 * max(largest, *(fastest for _, fastest in spans)))
    axes.spines["left"].set_visible(False)


def _steps_axis(drawn: Canvas, facts: Facts) -> None:
    drawn.axes.grid(axis="y")
    last = max(step["step"] for step in facts.steps)
    drawn.axes.set_xlim(0 if last > _MANY else 0.5, last * 1.02 if last > _MANY else last + 0.5)
    _integers(drawn.axes.xaxis)


def _integers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _log_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    def plain(value: float, _: int) -> str:
        return f"{value:,.0f}" if value >= 10 else f"{value:g}"

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _legend_above(drawn: Canvas) -> None:
    drawn.axes.figure.legend(loc="outside upper left", ncols=2, borderaxespad=0)


def _short(name: str, limit: int = 26) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _work(speed: Mapping[str, Any]) -> str:
    return "prefill" if speed.get("what") == "prefill" else f"decode, {speed['batch']} at a time"
