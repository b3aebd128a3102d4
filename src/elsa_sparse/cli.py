"""The ``elsa`` command: pack, unpack and inspect checkpoints; plan a run."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from elsa_sparse.inspecting import Row, by_layer, summarize
from elsa_sparse.inspecting import inspect as inspect_checkpoint
from elsa_sparse.writing import DEFAULT_SHARD_SIZE, save_sparse
from elsa_sparse.writing import unpack as unpack_checkpoint

__all__ = ["app"]

app = typer.Typer(
    help="Sparse checkpoints of pruned models: make them, turn them back, look into them. And plan a pruning run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class EncodingName(str, Enum):
    """Encodings that a whole checkpoint can be packed in."""

    coded = "coded"
    bitmask = "bitmask"


Source = Annotated[
    Path, typer.Argument(metavar="DIR", help="Checkpoint directory.", exists=True, file_okay=False, show_default=False)
]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest file, like 500MB or 2GB.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in OUT, if there is one.")]


@app.command()
def pack(
    directory: Source,
    out: Target,
    encoding: Annotated[
        EncodingName, typer.Option(help="coded: smallest. bitmask: the layout of compressed-tensors up to 0.14.")
    ] = EncodingName.coded,
    max_shard_size: ShardSize = DEFAULT_SHARD_SIZE,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint in the sparse format, which transformers and vLLM load with elsa-modifier installed."""
    with _errors_in_words():
        save_sparse(directory, out, encoding=encoding.value, max_shard_size=max_shard_size, overwrite=overwrite)
        before = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        after = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    Console().print(f"{out}: {_megabytes(after)} MB, was {_megabytes(before)} MB ({before / max(1, after):.2f}x)")


@app.command()
def unpack(
    directory: Source, out: Target, max_shard_size: ShardSize = DEFAULT_SHARD_SIZE, overwrite: Overwrite = False
) -> None:
    """Write a sparse checkpoint as plain dense safetensors, for any other engine."""
    with _errors_in_words():
        unpack_checkpoint(directory, out, max_shard_size=max_shard_size, overwrite=overwrite)
        after = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    Console().print(f"{out}: {_megabytes(after)} MB")


@app.command()
def inspect(
    directory: Source,
    tensors: Annotated[bool, typer.Option("--tensors", help="A row for every tensor instead of every layer.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every tensor of a sparse checkpoint and check it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: total, layers and tensors.")] = False,
) -> None:
    """List a checkpoint's sparsity and size, layer by layer. Dense checkpoints too."""
    with _errors_in_words():
        rows = inspect_checkpoint(directory, verify=verify)
    layers, total = by_layer(rows), summarize("total", rows)
    if as_json:
        document = {"total": _as_json(total), "layers": [*map(_as_json, layers)], "tensors": [*map(_as_json, rows)]}
        print(json.dumps(document, indent=1))
        return
    table = Table(title=str(directory), caption="sparsity: of matrices. ratio: dense bytes for each that is stored.")
    table.add_column("tensor" if tensors else "layer", overflow="fold", ratio=1)
    table.add_column("stored as")
    for column in ("sparsity", "dense MB", "stored MB", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows if tensors else layers:
        table.add_row(*_cells(row))
    table.add_section()
    table.add_row(*_cells(total), style="bold")
    Console().print(table)


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory with a config.json, or a name on the hub. No weights.")
    ],
    recipe: Annotated[
        Path, typer.Option(help="Recipe with an ELSAModifier.", exists=True, dir_okay=False, show_default=False)
    ],
    gpus: Annotated[int, typer.Option(help="GPUs that share the run.", min=1)] = 1,
    gpu_memory: Annotated[float, typer.Option(help="Memory of each, in GB.", min=0)] = 80.0,
    tflops: Annotated[
        float,
        typer.Option(help="What each is assumed to sustain, in TFLOP/s; an H100's peak in bf16 is 989.", min=1e-6),
    ] = 400.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, memory in bytes.")] = False,
) -> None:
    """Say what memory and time a run will take, and what would make it fit. Exit status 1 if it does not fit."""
    with _errors_in_words(status=2):
        # llm-compressor, which only this command needs, logs to what is stdout when it is imported.
        with redirect_stdout(sys.stderr):
            from elsa_modifier.planning.command import run

        fits = run(model, recipe, gpus=gpus, gpu_memory=gpu_memory, tflops=tflops, json_output=as_json)
    raise typer.Exit(0 if fits else 1)


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        ", ".join(row.encodings),
        f"{row.sparsity:.2%}",
        _megabytes(row.dense_bytes),
        _megabytes(row.stored_bytes),
        f"{row.ratio:.2f}",
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f}"


def _as_json(row: Row) -> dict[str, object]:
    return asdict(row) | {"ratio": row.ratio}


@contextmanager
def _errors_in_words(status: int = 1) -> Iterator[None]:
    """What a user can act on is a line, not a traceback.

    :param status: exit status of the command
    """
    try:
        yield
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False, markup=True)
        raise typer.Exit(status) from error
