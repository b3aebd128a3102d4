"""A plan as tables for a terminal, or as one JSON document."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from elsa_modifier.planning.options import Remedy, as_yaml
from elsa_modifier.planning.planner import Plan
from elsa_sparse.errors import printable

__all__ = ["as_json", "print_plan"]

_LINES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "teacher": "teacher",
    "admm_state": "ADMM state",
    "activations": "activations",
    "gathered": "gathered layers",
}
_RANKS = "Several GPUs: as parallel 'fsdp' shares the work, started by torchrun with a process for each."


def print_plan(plan: Plan, remedy: Remedy | None, *, title: str) -> None:
    """Print memory, work, and what would make the run fit.

    :param remedy: for a plan that does not fit
    """
    console = Console()
    console.print(_memory_table(plan, title))
    console.print(_work(plan), highlight=False)
    if plan.offloaded:
        moved = f"In main memory: {_gigabytes(plan.offloaded)} GB, brought to the GPU in every step, and back."
        console.print(moved, highlight=False)
    if plan.gpus > 1:
        console.print(_RANKS, highlight=False)
    if remedy is None:
        console.print(f"Fits {_gpus(plan)}.", highlight=False)
        return
    console.print(f"Does not fit {_gpus(plan)}.", highlight=False)
    if not remedy.changes:
        console.print("No field of the recipe would save memory: more GPUs are needed, or larger ones.")
        return
    table = Table(title="Fields that save memory")
    table.add_column("each by itself", overflow="fold")
    table.add_column("saves GB", justify="right", no_wrap=True)
    for change in remedy.changes:
        table.add_row(as_yaml(change.fields), _gigabytes(change.saves))
    console.print(table)
    total = f"{_gigabytes(remedy.plan.memory.total)} GB"
    if remedy.plan.fits:
        verdict = f"These together make it fit, in {total}"
    else:
        verdict = f"More GPUs are needed, or larger ones: all that go together still take {total}"
    console.print(f"{verdict}: {as_yaml(remedy.together)}", highlight=False)


def as_json(plan: Plan, remedy: Remedy | None) -> dict[str, Any]:
    """The same for programs: memory in bytes a GPU."""
    document: dict[str, Any] = {
        "fits": plan.fits,
        "gpus": plan.gpus,
        "capacity": plan.capacity,
        "memory": asdict(plan.memory) | {"total": plan.memory.total},
        "offloaded": plan.offloaded,
        "parameters": plan.parameters,
        "pruned": plan.pruned,
        "steps": plan.settings.steps,
        "tokens": plan.tokens,
        "flops": plan.flops,
        "tflops_per_gpu": plan.tflops,
        "hours": plan.hours,
    }
    if remedy is not None:
        document["changes"] = [asdict(change) for change in remedy.changes]
        document["together"] = {
            "fields": remedy.together,
            "total": remedy.plan.memory.total,
            "fits": remedy.plan.fits,
        }
    return document


def _memory_table(plan: Plan, title: str) -> Table:
    table = Table(title=Text(printable(title)), caption="GB: 10^9 bytes, at the fullest moment of a step.")
    table.add_column("memory")
    table.add_column("GB per GPU", justify="right", no_wrap=True)
    table.add_column("how it is held", overflow="fold")
    notes = _notes(plan)
    for line, name in _LINES.items():
        if getattr(plan.memory, line) or line not in ("gathered", "teacher"):
            table.add_row(name, _gigabytes(getattr(plan.memory, line)), notes[line])
    table.add_section()
    table.add_row("total", _gigabytes(plan.memory.total), f"of {_gigabytes(plan.capacity)}", style="bold")
    return table


def _notes(plan: Plan) -> dict[str, str]:
    s = plan.settings
    shared = "" if plan.gpus == 1 else f", shared by {plan.gpus}"
    checkpointed = "each layer's input kept" if s.activation_checkpointing else "all kept for backward"
    return {
        "weights": f"{plan.parameters:,} in {s.weight_dtype}{shared}",
        "gradients": ("the largest" if s.gradient_release else "all") + f", in {s.weight_dtype}{shared}",
        "optimizer": f"{s.optimizer}{shared}" + (", of two weights; the others in main memory" * s.offload_state),
        "teacher": f"the dense weights in bf16, for {s.objective.name}{shared}",
        "admm_state": (f"{plan.pruned:,} in {s.state_dtype}, and " if s.has_pair and not s.offload_state else "")
        + f"mask bits{shared}",
        "activations": f"{plan.sequences} x {s.sequence_length} tokens, {checkpointed}",
        "gathered": "whole layers to compute with",
    }


def _work(plan: Plan) -> str:
    return (
        f"{plan.settings.steps:,} steps, {plan.tokens:,} tokens, "
        f"{plan.flops:.3g} FLOPs: {plan.hours:,.1f} hours at {plan.tflops:g} TFLOP/s a GPU (assumed)."
    )


def _gpus(plan: Plan) -> str:
    return f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''} of {_gigabytes(plan.capacity)} GB"


def _gigabytes(count: int) -> str:
    # Small models are planned too, and a line of theirs should not read 0.
    return f"{count / 1e9:,.2f}" if count >= 1e7 else f"{count / 1e9:.3g}"
