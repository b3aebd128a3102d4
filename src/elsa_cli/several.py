"""Options that take several values after one another: ``--sparsities 50 60 70``."""

from typing import Any

from typer.core import TyperCommand

__all__ = ["several"]


def several(*options: str) -> type[TyperCommand]:
    """A command class whose options of these names take all values up to the next option.

    They may be given several times too, which is all that click knows. An argument of the command goes before them, or
    after another option.

    :param options: such as ``--sparsities``
    """

    class Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, list(_repeated(args, options)))

    return Command


def _repeated(arguments: list[str], options: tuple[str, ...]) -> list[str]:
    """The same arguments with the option before each of its values."""
    found: list[str] = []
    current: str | None = None
    values = 0
    for argument in arguments:
        if argument.startswith("-"):
            current, values = (argument, 0) if argument in options else (None, 0)
            found.append(argument)
        elif current is not None and values:
            found += [current, argument]
            values += 1
        else:
            found.append(argument)
            values += 1
    return found
