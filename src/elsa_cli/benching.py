"""``elsa bench``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from elsa_cli.output import Source, errors_in_words, megabytes, plain

if TYPE_CHECKING:
    from elsa_sparse.speed import Comparison

__all__ = ["bench"]


def bench(
    directory: Source,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Sequences decoded at a time; may be given several times.", show_default="1, 4, 16"),
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens that each sequence starts with.", min=1)] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens decoded of each sequence, in a round.", min=1)] = 16,
    rounds: Annotated[int, typer.Option(help="Times that everything is measured; medians count.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", min=1, show_default="torch's own")] = None,
    int8_head: Annotated[
        bool, typer.Option("--int8-head", help="Hold the compressed model's output head in 8-bit integers.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: tokens a second, bytes.")] = False,
) -> None:
    """Measure a pruned model on this machine's CPU: dense, and with its weights compressed in memory."""
    with errors_in_words():
        measured = _compare(directory, batch or [1, 4, 16], prompt, tokens, rounds, threads, int8_head)
    if as_json:
        speeds = [asdict(speed) | {"ratio": speed.ratio} for speed in measured.speeds]
        print(json.dumps(asdict(measured) | {"speeds": speeds}, indent=1))
        return
    Console().print(_table(directory, measured))


def _compare(
    directory: Path, batches: list[int], prompt: int, tokens: int, rounds: int, threads: int | None, int8_head: bool
) -> "Comparison":
    try:
        from elsa_sparse.speed import compare_speed

        return compare_speed(
            directory,
            batches=batches,
            prompt=prompt,
            tokens=tokens,
            rounds=rounds,
            threads=threads,
            int8_head=int8_head,
        )
    except ImportError as error:
        raise ValueError(str(error)) from error


def _table(directory: Path, measured: "Comparison") -> Table:
    layers, compressed = measured.layers
    caption = (
        f"{compressed} of {layers} linear layers are compressed. {measured.dtype}, {measured.threads} threads, kernels "
        f"{measured.backend}; medians of {measured.rounds} rounds, prompts of {measured.prompt} tokens. Largest "
        f"difference of a logit: {measured.logit_difference:.3g}, of logits up to {measured.logit_range:.3g}; "
        "docs/compressed_inference.md says how much of such a difference is rounding."
    )
    table = Table(title=plain(directory), caption=caption)
    table.add_column("")
    for column in ("dense", "compressed", "ratio", "in a round"):
        table.add_column(column, justify="right", no_wrap=True)
    for speed in measured.speeds:
        what = "prefill, tokens/s" if speed.what == "prefill" else f"decode, {speed.batch} at a time, tokens/s"
        spread = f"{speed.slowest:.2f} - {speed.fastest:.2f}"
        table.add_row(what, f"{speed.dense:,.1f}", f"{speed.compressed:,.1f}", f"{speed.ratio:.2f}", spread)
    table.add_section()
    ratio = measured.dense_bytes / measured.compressed_bytes
    sizes = map(megabytes, (measured.dense_bytes, measured.compressed_bytes))
    table.add_row("weights in memory, MB", *sizes, f"{ratio:.2f}", "")
    return table
