"""What commands share: arguments, and how sizes and errors are printed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["Source", "errors_in_words", "megabytes"]

Source = Annotated[
    Path, typer.Argument(metavar="DIR", help="Checkpoint directory.", exists=True, file_okay=False, show_default=False)
]


def megabytes(count: int) -> str:
    """A size as it is printed: 10^6 bytes, two digits."""
    return f"{count / 1e6:,.2f}"


@contextmanager
def errors_in_words(status: int = 1) -> Iterator[None]:
    """What a user can act on is a line, not a traceback.

    :param status: exit status of the command
    """
    try:
        yield
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False, markup=True)
        raise typer.Exit(status) from error
