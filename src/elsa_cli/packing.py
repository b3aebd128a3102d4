"""``elsa pack`` and ``elsa unpack``."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from elsa_cli.output import Source, errors_in_words, megabytes, plain
from elsa_sparse.writing import DEFAULT_SHARD_SIZE, Written, save_sparse
from elsa_sparse.writing import unpack as unpack_checkpoint

__all__ = ["pack", "unpack"]


class EncodingName(str, Enum):
    """Encodings that a whole checkpoint can be packed in."""

    coded = "coded"
    bitmask = "bitmask"


Target = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest file, like 500MB or 2GB.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the sparse checkpoint in OUT, if there is one.")]


def pack(
    directory: Source,
    out: Target,
    encoding: Annotated[
        EncodingName, typer.Option(help="coded: smallest. bitmask: the layout of compressed-tensors up to 0.14.")
    ] = EncodingName.coded,
    bit_equal: Annotated[
        bool, typer.Option("--bit-equal", help="Keep the sign of zeros, each at the price of a weight that is kept.")
    ] = False,
    max_shard_size: ShardSize = DEFAULT_SHARD_SIZE,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint in the sparse format, which transformers and vLLM load with elsa-modifier installed."""
    with errors_in_words():
        written = save_sparse(
            directory,
            out,
            encoding=encoding.value,
            bit_equal=bit_equal,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    Console().print(_summary(out, written), soft_wrap=True)
    if written.signs:
        Console().print(f"{written.signs:,} zeros were -0.0 and are 0.0 now; --bit-equal keeps the sign.")


def unpack(
    directory: Source, out: Target, max_shard_size: ShardSize = DEFAULT_SHARD_SIZE, overwrite: Overwrite = False
) -> None:
    """Write a sparse checkpoint as plain dense safetensors, for any other engine."""
    with errors_in_words():
        written = unpack_checkpoint(directory, out, max_shard_size=max_shard_size, overwrite=overwrite)
    Console().print(_summary(out, written), soft_wrap=True)


def _summary(out: Path, written: Written) -> Text:
    """What was written, whatever else lies in the directory."""
    text = plain(out) + f": {megabytes(written.stored_bytes)} MB"
    if 0 < written.stored_bytes < written.dense_bytes:
        ratio = written.dense_bytes / written.stored_bytes
        text += f", {megabytes(written.dense_bytes)} MB dense ({ratio:.2f}x)"
    return text
