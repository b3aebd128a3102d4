"""``elsa inspect``."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from elsa_cli.output import Source, errors_in_words, megabytes, plain
from elsa_sparse.inspecting import Row, by_layer, summarize
from elsa_sparse.inspecting import inspect as inspect_checkpoint

__all__ = ["inspect"]


def inspect(
    directory: Source,
    tensors: Annotated[bool, typer.Option("--tensors", help="A row for every tensor instead of every layer.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every tensor of a sparse checkpoint and check it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: total, layers and tensors.")] = False,
) -> None:
    """List a checkpoint's sparsity and size, on disk and in memory, layer by layer. Dense checkpoints too."""
    with errors_in_words():
        rows = inspect_checkpoint(directory, verify=verify)
        layers, total = by_layer(rows), summarize("total", rows)
    if as_json:
        document = {"total": _as_json(total), "layers": [*map(_as_json, layers)], "tensors": [*map(_as_json, rows)]}
        print(json.dumps(document, indent=1))
        return
    caption = "In MB. sparsity: of matrices, embeddings too. ratio: dense bytes for each that is stored."
    caption += " memory: of weights loaded with compressed=True"
    caption += "." if total.memory_bytes is not None else ", where elsa-kernels is installed and can tell."
    table = Table(title=plain(directory), caption=caption)
    table.add_column("tensor" if tensors else "layer", overflow="fold", ratio=1)
    table.add_column("stored as")
    for column in ("sparsity", "dense", "stored", "ratio", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows if tensors else layers:
        table.add_row(*_cells(row))
    table.add_section()
    table.add_row(*_cells(total), style="bold")
    Console().print(table)


def _cells(row: Row) -> list[str | Text]:
    return [
        plain(row.name),
        ", ".join(row.encodings),
        f"{row.sparsity:.2%}",
        megabytes(row.dense_bytes),
        megabytes(row.stored_bytes),
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.memory_bytes is None else megabytes(row.memory_bytes),
    ]


def _as_json(row: Row) -> dict[str, object]:
    return asdict(row) | {"ratio": row.ratio}
