"""The page of a report: one HTML file with everything in it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elsa_modifier.reporting.drawing import SERIES, Drawing
from elsa_modifier.reporting.facts import Facts
from elsa_modifier.reporting.figures import (
    draw_budget,
    draw_layers,
    draw_perplexity,
    draw_run,
    draw_sizes,
    draw_speed,
    draw_zero_shot,
)
from elsa_modifier.reporting.words import bytes_in_words, counted, duration, number, often, percent, shell
from elsa_sparse.errors import printable
from elsa_sparse.sources import BENCH_FILE

__all__ = ["Section", "build_page", "render"]

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass
class Section:
    """A part of the page; what is empty is not shown.

    :param columns: of the table; the first is a name, the others numbers
    :param missing: what is not known, and the command that makes it known
    :param code: shown as it is, after its title
    """

    title: str
    text: list[str] = field(default_factory=list)
    columns: Sequence[str] = ()
    rows: list[Sequence[str]] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    code: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)


def build_page(facts: Facts, others: Sequence[Facts] = ()) -> tuple[str, list[Drawing]]:
    """HTML of a report, and its figures.

    :param others: what it is compared with
    :raises ImportError: if matplotlib or Jinja2 is not installed
    """
    sections = [
        _done(facts),
        _quality(facts),
        _against_sparsity(facts, others),
        _run(facts),
        _zeros(facts),
        _sizes(facts),
        _speed(facts),
        _zero_shot(facts, others),
        _serving(facts),
    ]
    drawings = [drawing for section in sections for drawing in section.drawings]
    return render(facts, sections), drawings


def render(facts: Facts, sections: Sequence[Section]) -> str:
    """HTML of sections under a heading with the numbers that matter most."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("a report needs Jinja2: pip install 'elsa-modifier[plot]'") from error
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    return template.render(name=facts.name, tiles=_tiles(facts), sections=sections, series=SERIES)


def _tiles(facts: Facts) -> list[tuple[str, str]]:
    """The numbers that matter most, and what they are."""
    pruned = facts.pruned
    tiles = [(percent(facts.sparsity), f"zeros in {len(pruned)} matrices of {facts.architecture or 'the model'}")]
    measured = perplexities(facts)
    if measured:
        text, dense, value = measured[0]
        was = f", {number(dense)} dense" if dense is not None else ""
        tiles.append((number(value), f"perplexity on {text}{was}"))
    total = facts.total
    tiles.append((bytes_in_words(total.stored_bytes), f"on disk, {bytes_in_words(total.dense_bytes)} dense"))
    decode = [speed for speed in (facts.bench or {}).get("speeds", ()) if speed.get("what") == "decode"]
    if decode:
        tiles.append((f"{decode[0]['ratio']:.2f}x", f"tokens a second, {decode[0]['batch']} at a time"))
    return tiles


def perplexities(facts: Facts) -> list[tuple[str, float | None, float]]:
    """Text, perplexity of the dense model, perplexity: of an evaluation, or else of the text the run held out."""
    if facts.evaluation is not None and facts.evaluation.perplexity:
        return [(printable(p.text, 60), p.dense, p.value) for p in facts.evaluation.perplexity]
    summary = facts.summary
    if summary is None or summary.perplexity_after is None:
        return []
    return [("text held out", summary.perplexity_before, summary.perplexity_after)]


def _done(facts: Facts) -> Section:
    section = Section("What was done", columns=("", ""))
    summary, steps = facts.summary, facts.steps
    rows = section.rows
    if summary is not None:
        rows += [(name, printable(value, 200)) for name, value in _given(summary) if value]
        rows.append(("tokens of the text", f"{summary.training_tokens:,}, gone over {often(summary.epochs)}"))
    if steps:
        rows.append(("steps", f"{len(steps):,}, {facts.tokens:,} tokens"))
        rows.append(("time of all steps", duration(float(steps[-1].get("seconds", 0)))))
    if summary is not None:
        memory = bytes_in_words(summary.memory)
        if summary.device_memory is not None:
            memory += f"; on the accelerator {bytes_in_words(summary.device_memory)}"
        rows.append(("most memory", memory))
    if facts.unreached:
        rows.append(("left dense, as no text reached them", counted(f"{len(facts.unreached):,}", "module")))
    changed = [(name, _value(value)) for name, value in facts.fields.items() if name in _SHOWN]
    section.rows += changed
    if facts.recipe is not None:
        section.code.append(("recipe.yaml", facts.recipe))
    if not facts.steps and not facts.fields:
        section.missing.append(("how it was pruned", "elsa prune MODEL --recipe elsa_80 --data TEXTS --out DIR"))
    return section


_SHOWN = ("sparsity", "mask_structure", "objective", "sparsity_schedule", "penalty", "optimizer", "lr", "weight_dtype")


def _given(summary: Any) -> list[tuple[str, str | None]]:
    return [("model", summary.base), ("text", summary.data), ("recipe", summary.recipe)]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(inner)}" for key, inner in value.items())
    if value is None:
        return "chosen by itself"
    return printable(value, 200)


def _quality(facts: Facts) -> Section:
    section = Section("Before and after", columns=("perplexity", "dense", "pruned", "ratio"))
    for text, dense, value in perplexities(facts):
        ratio = "" if dense is None else f"{value / dense:.2f}"
        section.rows.append((text, "" if dense is None else number(dense), number(value), ratio))
    evaluation = facts.evaluation
    if evaluation is not None:
        for agreement in evaluation.agreement:
            section.text.append(
                f"On {printable(agreement.text, 60)} it finds the same next token most likely as the dense model in "
                f"{agreement.top1:.1%} of places; KL divergence {agreement.kl:.3g} nats a token."
            )
        for measured in evaluation.perplexity:
            section.text.append(
                f"{printable(measured.text, 60)}: {measured.tokens:,} tokens in windows of {measured.window:,}."
            )
        section.text.append(f"Measured through {printable(evaluation.engine, 100)}.")
    elif facts.summary is not None and section.rows:
        section.text.append(f"Measured on {facts.summary.held_out_tokens:,} tokens that the run did not train on.")
    if evaluation is None:
        base = printable(facts.summary.base, 200) if facts.summary is not None and facts.summary.base else "DENSE"
        command = f"elsa eval {shell(facts.directory)} --dense {shell(base)}"
        section.missing.append(("perplexity on other texts, and agreement with the dense model", command))
    return section


def _against_sparsity(facts: Facts, others: Sequence[Facts]) -> Section:
    section = Section("Perplexity against sparsity")
    if not others:
        command = f"elsa report {shell(facts.directory)} OTHERS"
        section.missing.append(("other sparsities of the same model, to compare with", command))
        return section
    points: dict[str, list[tuple[float, float]]] = {}
    dense: dict[str, float] = {}
    texts: list[str] = []
    for one in (facts, *others):
        for text, before, value in perplexities(one):
            points.setdefault(text, []).append((100 * one.sparsity, value))
            if before is not None:
                dense.setdefault(text, before)
            texts = list(dict.fromkeys([*texts, text]))
    drawing = draw_perplexity(points, dense)
    if drawing is not None:
        section.drawings.append(drawing)
    section.columns = ("directory", "zeros", *texts, "on disk")
    for one in sorted((facts, *others), key=lambda one: one.sparsity):
        own = {text: number(value) for text, _, value in perplexities(one)}
        row = (one.name, percent(one.sparsity), *(own.get(text, "") for text in texts))
        section.rows.append((*row, bytes_in_words(one.total.stored_bytes)))
    return section


def _run(facts: Facts) -> Section:
    section = Section("The run", drawings=draw_run(facts))
    if not section.drawings:
        section.missing.append(("loss, residual and mask over the run", "elsa prune, which writes elsa_history.json"))
    return section


def _zeros(facts: Facts) -> Section:
    section = Section("Where the zeros are", drawings=[d for d in (draw_layers(facts), draw_budget(facts)) if d])
    if not facts.pruned:
        section.text.append("No matrix of a layer has zeros: this model is not pruned.")
        return section
    section.columns = ("layer", "zeros", "dense", "on disk")
    for row in facts.layers:
        if row.weights:
            sizes = bytes_in_words(row.dense_bytes), bytes_in_words(row.stored_bytes)
            section.rows.append((printable(row.name, 80), percent(row.sparsity), *sizes))
    return section


def _sizes(facts: Facts) -> Section:
    total = facts.total
    section = Section("Size", columns=("", "dense", "as it is", "ratio"))
    sizes = {"dense": total.dense_bytes, "on disk": total.stored_bytes}
    section.rows.append(_size_row("on disk", total.dense_bytes, total.stored_bytes))
    if total.memory_bytes is not None:
        sizes["in memory, compressed"] = total.memory_bytes
        section.rows.append(_size_row("in memory, compressed", total.dense_bytes, total.memory_bytes))
    else:
        section.missing.append(("bytes in memory with compressed weights", "pip install elsa-kernels"))
    section.drawings.append(draw_sizes(sizes))
    if not facts.sparse and facts.pruned:
        out = shell(facts.directory.with_name(f"{facts.directory.resolve().name}-sparse"))
        section.missing.append(("a directory as small as the zeros allow", f"elsa pack {shell(facts.directory)} {out}"))
    return section


def _size_row(name: str, dense: int, stored: int) -> Sequence[str]:
    ratio = f"{dense / stored:.2f}" if stored else ""
    return name, bytes_in_words(dense), bytes_in_words(stored), ratio


def _speed(facts: Facts) -> Section:
    section = Section("Speed")
    speeds = (facts.bench or {}).get("speeds") or []
    if not speeds:
        file = shell(facts.directory / BENCH_FILE)
        section.missing.append(
            ("tokens a second on this machine", f"elsa bench {shell(facts.directory)} --json > {file}")
        )
        return section
    bench = facts.bench or {}
    section.drawings.append(draw_speed(speeds))
    section.columns = ("tokens a second", "dense", "compressed", "ratio", "in a round")
    for speed in speeds:
        what = "prefill" if speed["what"] == "prefill" else f"decode, {speed['batch']} at a time"
        spread = f"{speed['slowest']:.2f} - {speed['fastest']:.2f}"
        row = (what, f"{speed['dense']:,.1f}", f"{speed['compressed']:,.1f}", f"{speed['ratio']:.2f}", spread)
        section.rows.append(row)
    threads = counted(printable(bench.get("threads"), 20), "thread")
    rounds = counted(printable(bench.get("rounds"), 20), "round")
    section.text.append(
        f"By elsa bench in {printable(bench.get('dtype'), 20)} on {threads}, "
        f"kernels {printable(bench.get('backend'), 40)}; medians of {rounds}."
    )
    return section


def _zero_shot(facts: Facts, others: Sequence[Facts]) -> Section:
    section = Section("Zero-shot")
    scores = {one.name: _scores(one) for one in (facts, *others)}
    scores = {name: own for name, own in scores.items() if own}
    if facts.name not in scores:
        section.missing.append(
            ("zero-shot tasks", f"elsa eval {shell(facts.directory)} --tasks arc_easy --tasks hellaswag")
        )
        return section
    drawing = draw_zero_shot(scores)
    if drawing is not None:
        section.drawings.append(drawing)
    section.columns = ("task", *scores)
    for task in dict.fromkeys(task for own in scores.values() for task in own):
        section.rows.append((task, *(_score(own.get(task)) for own in scores.values())))
    limits = {task.limit for task in facts.evaluation.tasks} if facts.evaluation is not None else set()
    if limits - {None}:
        section.text.append(f"Of each task the first {max(limit or 0 for limit in limits):,} questions.")
    return section


def _scores(facts: Facts) -> dict[str, tuple[float, float | None]]:
    """Value and standard error by task; of several metrics of a task the first."""
    found: dict[str, tuple[float, float | None]] = {}
    for task in facts.evaluation.tasks if facts.evaluation is not None else ():
        if math.isfinite(task.value):
            found.setdefault(f"{printable(task.task, 40)}, {printable(task.metric, 30)}", (task.value, task.stderr))
    return found


def _score(score: tuple[float, float | None] | None) -> str:
    if score is None:
        return ""
    return f"{score[0]:.3f}" + (f" ± {score[1]:.3f}" if score[1] is not None else "")


def _serving(facts: Facts) -> Section:
    section = Section("Serve it")
    directory = shell(facts.directory)
    vllm = f"pip install --no-deps elsa-modifier elsa-kernels   # beside vLLM\nvllm serve {directory}"
    if facts.sparse:
        section.text.append("On a CPU its weights stay compressed in memory; on a GPU they are dense there.")
        section.code.append(("vLLM", vllm))
        section.code.append(
            (
                "transformers",
                "import elsa_modifier  # teaches transformers the format\n"
                "from transformers import AutoModelForCausalLM\n\n"
                f"model = AutoModelForCausalLM.from_pretrained({str(facts.directory)!r})",
            )
        )
    else:
        section.text.append(
            "Any engine loads it as it is, dense. Packed, it takes less disk, and on a CPU less memory."
        )
        sparse = shell(facts.directory.with_name(f"{facts.directory.resolve().name}-sparse"))
        section.code.append(("vLLM", f"vllm serve {directory}"))
        section.code.append(("packed", f"elsa pack {directory} {sparse}\nvllm serve {sparse}"))
    return section
