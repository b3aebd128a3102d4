"""``elsa report``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from elsa_cli.output import Source, errors_in_words, logs_to_stderr, plain

if TYPE_CHECKING:
    from elsa_modifier.reporting.command import Report

__all__ = ["report"]


def report(
    directory: Source,
    others: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DIR]...", help="Others to compare with, such as other sparsities.", exists=True, file_okay=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of the page and its figures.", show_default="DIR-report", file_okay=False),
    ] = None,
    card: Annotated[bool, typer.Option(help="Also write the model card, README.md in DIR.")] = True,
    base_model: Annotated[
        str | None, typer.Option(help="Name of the dense model on the hub, for the card.", show_default=False)
    ] = None,
) -> None:
    """Show what a run has come to: a page with figures, which needs nothing else, and the model card."""
    with errors_in_words():
        written = _run(directory, others or [], out, card, base_model)
    console = Console()
    console.print(plain(written.page) + f" and {len(written.figures)} figures beside it", soft_wrap=True)
    if written.card is not None:
        console.print(plain(written.card), soft_wrap=True)
    elif card:
        console.print("README.md in DIR is not by elsa-modifier, and stays as it is", soft_wrap=True)


def _run(directory: Path, others: list[Path], out: Path | None, card: bool, base_model: str | None) -> "Report":
    try:
        with logs_to_stderr():
            from elsa_modifier.reporting.command import run

            return run(directory, others, out=out, card=card, base_model=base_model)
    except ImportError as error:
        raise ValueError(str(error)) from error
