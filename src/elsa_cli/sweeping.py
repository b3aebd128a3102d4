"""``elsa sweep``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from elsa_cli.output import Dtype, errors_in_words, logs_to_stderr, plain

if TYPE_CHECKING:
    from elsa_modifier.sweeping.record import Sweep

__all__ = ["sweep"]


def sweep(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a model, or a name on the hub.")],
    sparsities: Annotated[
        list[str], typer.Option(help="In percent, or as fractions: 50 60 70 80 90.", show_default=False)
    ],
    recipe: Annotated[
        str,
        typer.Option(
            help="Recipe with an ELSAModifier, whose sparsity is replaced: a file, or a name such as elsa_90.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Text to train on: a file, a directory of .txt, .md and .jsonl files, or a data set on the hub.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the models, the figure and the table.", show_default=False)],
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            help="Texts to judge on: wikitext2, c4, a file, a directory.", show_default="what is held out of the data"
        ),
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of each of them, at most.", min=1)] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Tasks of lm-eval; paper is short for the seven of the paper.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task, at most.", min=1)] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="What models are judged in; auto: the checkpoint's, or float32 where bf16 is slow.")
    ] = Dtype.auto,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Between training checkpoints, if the recipe does not say; 0 makes none.", min=0)
    ] = 10.0,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep training checkpoints of runs that are finished.")
    ] = False,
) -> None:
    """Prune a model at several sparsities, judge each, draw perplexity against sparsity. Run again, it goes on."""
    with errors_in_words(), logs_to_stderr():
        from elsa_modifier.evaluating.tasks import TaskSettings
        from elsa_modifier.sweeping.checking import parse_sparsities
        from elsa_modifier.sweeping.command import SweepSettings
        from elsa_modifier.sweeping.command import sweep as run

        names = tuple(name for given in tasks or () for name in given.split(",") if name)
        settings = SweepSettings(
            evaluate=tuple(evaluate or ()),
            windows=windows,
            tasks=TaskSettings(names, limit) if names else None,
            dtype=dtype.value,
            checkpoint_minutes=checkpoint_minutes,
            keep_checkpoints=keep_checkpoints,
        )
        try:
            found = run(model, parse_sparsities(sparsities), recipe, data, out, settings)
        except ImportError as error:
            raise ValueError(str(error)) from error
    _print(found, out)


def _print(found: "Sweep", out: Path) -> None:
    table = Table(
        title=plain(found.model), caption=plain(f"{out}: sweep.json, sweep.md, and where it is drawn sweep.svg")
    )
    texts = [one.text for one in found.points[-1].evaluation.perplexity]
    table.add_column("sparsity", justify="right")
    for text in texts:
        table.add_column(plain(f"{text}, perplexity"), justify="right")
    rows = [(f"{100 * point.sparsity:g}%", point.evaluation) for point in found.points]
    for name, evaluation in [("dense", found.dense), *rows] if found.dense else rows:
        values = {one.text: f"{one.value:,.2f}" for one in evaluation.perplexity} if evaluation else {}
        table.add_row(name, *(values.get(text, "") for text in texts))
    Console().print(table)
