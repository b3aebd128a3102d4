"""``elsa plan``."""

from typing import Annotated

import typer

from elsa_cli.output import errors_in_words, logs_to_stderr

__all__ = ["plan"]


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory with a config.json, or a name on the hub. No weights.")
    ],
    recipe: Annotated[
        str, typer.Option(help="Recipe with an ELSAModifier: a file, or a name such as elsa_90.", show_default=False)
    ],
    gpus: Annotated[int, typer.Option(help="GPUs that share the run.", min=1, max=1_000_000)] = 1,
    gpu_memory: Annotated[float, typer.Option(help="Memory of each, in GB.", min=0, max=1e6)] = 80.0,
    tflops: Annotated[
        float,
        typer.Option(
            help="What each is assumed to sustain, in TFLOP/s; an H100's peak in bf16 is 989.", min=1e-6, max=1e9
        ),
    ] = 400.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, memory in bytes.")] = False,
) -> None:
    """Say what memory and time a run will take, and what would make it fit. Exit status 1 if it does not fit."""
    with errors_in_words(status=2):
        with logs_to_stderr():
            from elsa_modifier.planning.command import run

        fits = run(model, recipe, gpus=gpus, gpu_memory=gpu_memory, tflops=tflops, json_output=as_json)
    raise typer.Exit(0 if fits else 1)
