"""``elsa prune``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from elsa_cli.output import errors_in_words, logs_to_stderr, megabytes, plain

if TYPE_CHECKING:
    from elsa_modifier.pruning.command import Summary

__all__ = ["prune"]


def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a model, or a name on the hub.")],
    recipe: Annotated[
        str, typer.Option(help="Recipe with an ELSAModifier: a file, or a name such as elsa_90.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Text to train on: a file, a directory of .txt, .md and .jsonl files, or a data set on the hub.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the pruned model.", show_default=False)],
    resume: Annotated[
        str | None,
        typer.Option(
            help="auto: go on from the last training checkpoint, if there is one. never: begin anew. Or the path of "
            "one. Without it, what the recipe says.",
            metavar="[auto|never|PATH]",
            show_default=False,
        ),
    ] = None,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Between training checkpoints, if the recipe does not say; 0 makes none.", min=0)
    ] = 10.0,
    track: Annotated[
        list[str] | None, typer.Option(help="A tracker to tell of every step: tensorboard, wandb, trackio.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Prune a model with a recipe. Run the same command again, and it goes on where it was stopped.

    On several GPUs, or processes of a CPU: torchrun --nproc-per-node 8 -m elsa_cli prune ...
    """
    with errors_in_words(), logs_to_stderr():
        from elsa_modifier.pruning.command import run

        summary = run(model, recipe, data, out, resume=resume, checkpoint_minutes=checkpoint_minutes, track=track or ())
    if summary is None:
        return
    if as_json:
        print(json.dumps(asdict(summary), indent=1))
    else:
        _print(summary)


def _print(summary: "Summary") -> None:
    table = Table(show_header=False, title=plain(summary.model))
    table.add_row("sparsity of what was pruned", f"{summary.sparsity:.2%}")
    if summary.perplexity_before is not None and summary.perplexity_after is not None:
        values = f"{summary.perplexity_before:,.2f} before, {summary.perplexity_after:,.2f} after"
        table.add_row("perplexity", f"{values} ({summary.held_out_tokens:,} tokens held out)")
    else:
        table.add_row("perplexity", "not measured: too little text to hold some out")
    table.add_row("text", f"{summary.training_tokens:,} tokens, gone over {summary.epochs:.1f} times")
    table.add_row("trained", f"{summary.steps:,} steps, {summary.tokens:,} predicted tokens")
    table.add_row("time", f"{_duration(summary.seconds)}; training {_duration(summary.training_seconds)} in all")
    memory = f"{megabytes(summary.memory)} MB"
    if summary.device_memory is not None:
        memory += f"; on the accelerator {megabytes(summary.device_memory)} MB"
    if summary.processes > 1:
        memory += f", in the first of {summary.processes} processes"
    table.add_row("most memory", memory)
    for name, place in (("model", summary.model), ("history", summary.history), ("metrics", summary.metrics)):
        if place is not None:
            table.add_row(name, plain(place))
    if summary.checkpoints is not None:
        size = f" ({megabytes(summary.checkpoint_bytes)} MB, which are not needed any more)"
        table.add_row("training checkpoints", plain(summary.checkpoints) + size)
    Console().print(table)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
