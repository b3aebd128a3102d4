"""What commands share: arguments, and how sizes and errors are printed."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from elsa_sparse.errors import printable

if TYPE_CHECKING:
    from loguru import Record

__all__ = ["Dtype", "Source", "errors_in_words", "logs_to_stderr", "megabytes", "plain"]

Source = Annotated[
    Path, typer.Argument(metavar="DIR", help="Checkpoint directory.", exists=True, file_okay=False, show_default=False)
]


class Dtype(str, Enum):
    """What a model can compute in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def megabytes(count: int) -> str:
    """A size as it is printed: 10^6 bytes, two digits."""
    return f"{count / 1e6:,.2f}"


def plain(text: object, limit: int = 300) -> Text:
    """Text out of a file or from the command line as it is printed: no markup of rich's, no control characters."""
    return Text(printable(text, limit))


@contextmanager
def errors_in_words(status: int = 1) -> Iterator[None]:
    """What a user can act on is a line, not a traceback; and so is a warning.

    :param status: exit status of the command
    """
    console = Console(stderr=True)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _print_line(console, "[yellow]warning:[/yellow] ", message)
        try:
            yield
        except (OSError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            _print_line(console, "[red]error:[/red] ", str(error) or "this takes more memory than there is")
            raise typer.Exit(status) from error


@contextmanager
def logs_to_stderr() -> Iterator[None]:
    """llm-compressor and lm-eval log to what is stdout when they are imported, where results are to be alone."""
    from loguru import logger

    logger.configure(patcher=_say_once)
    with redirect_stdout(sys.stderr):
        yield


def _say_once(record: "Record") -> None:
    """llm-compressor says that it compresses on a CPU whenever it looks for a GPU, whoever asks and for whatever."""
    if record["function"] == "get_main_device":
        record["message"] = "No accelerator available: computing on the CPU"
        record["extra"]["log_once"] = True


def _print_line(console: Console, label: str, text: object) -> None:
    console.print(Text.from_markup(label) + plain(text, 4000), soft_wrap=True, highlight=False)
