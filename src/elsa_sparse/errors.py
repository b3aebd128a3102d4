"""The one error of this package, and how text out of a file is shown."""

from pathlib import Path

__all__ = ["SparseCheckpointError", "printable"]


def printable(text: object, limit: int = 1000) -> str:
    """Text for a terminal: on one line, with escapes for what is not printable, cut to ``limit`` characters.

    Names in files may hold control sequences, line ends, or halves of surrogate pairs, which cannot even be written.
    """
    shown = str(text)
    if len(shown) > limit:
        shown = f"{shown[: limit // 2]}...{shown[-limit // 2 :]}"
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


class SparseCheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and, where there is one, the tensor.

    It is one line of printable characters, whatever the file holds.
    """

    def __init__(self, problem: str, *, file: str | Path | None = None, tensor: str | None = None) -> None:
        where = [printable(file)] if file is not None else []
        where += [f"tensor {printable(tensor, 200)}"] if tensor is not None else []
        super().__init__(": ".join([*where, printable(problem, 2000)]))
