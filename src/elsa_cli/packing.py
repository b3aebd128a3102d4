"""``elsa pack`` and ``elsa unpack``."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from elsa_cli.output import Source, errors_in_words, megabytes
from elsa_sparse.writing import DEFAULT_SHARD_SIZE, save_sparse
from elsa_sparse.writing import unpack as unpack_checkpoint

__all__ = ["pack", "unpack"]


class EncodingName(str, Enum):
    """Encodings that a whole checkpoint can be packed in."""

    coded = "coded"
    bitmask = "bitmask"


Target = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest file, like 500MB or 2GB.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in OUT, if there is one.")]


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
    with errors_in_words():
        save_sparse(directory, out, encoding=encoding.value, max_shard_size=max_shard_size, overwrite=overwrite)
        before = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        after = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    Console().print(f"{out}: {megabytes(after)} MB, was {megabytes(before)} MB ({before / max(1, after):.2f}x)")


def unpack(
    directory: Source, out: Target, max_shard_size: ShardSize = DEFAULT_SHARD_SIZE, overwrite: Overwrite = False
) -> None:
    """Write a sparse checkpoint as plain dense safetensors, for any other engine."""
    with errors_in_words():
        unpack_checkpoint(directory, out, max_shard_size=max_shard_size, overwrite=overwrite)
        after = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    Console().print(f"{out}: {megabytes(after)} MB")
