"""``elsa eval``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from elsa_cli.output import Dtype, errors_in_words, logs_to_stderr, plain

if TYPE_CHECKING:
    from elsa_modifier.evaluating.record import Evaluation

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Model: a directory, dense or sparse, or a hub name.")],
    compare: Annotated[
        list[str] | None, typer.Option(help="Models to judge in the same way, in columns beside the first.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Texts of perplexity: wikitext2, c4, a file, a directory, or a data set on the hub.",
            show_default="wikitext2 c4",
        ),
    ] = None,
    perplexity: Annotated[bool, typer.Option(help="Measure perplexity.")] = True,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Tasks of lm-eval; paper is short for the seven of the paper.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task, at most.", min=1)] = None,
    fewshot: Annotated[
        int | None, typer.Option(help="Examples before a question.", min=0, show_default="the task's")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Directory of more tasks for lm-eval.", exists=True, file_okay=False)
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 2048,
    windows: Annotated[int | None, typer.Option(help="Windows of each text, at most.", min=1)] = None,
    dense: Annotated[
        str | None,
        typer.Option(help="The dense model, to say how much predictions agree.", show_default="what DIR names"),
    ] = None,
    no_dense: Annotated[bool, typer.Option("--no-dense", help="Compare with no dense model.")] = False,
    compressed: Annotated[
        bool, typer.Option("--compressed", help="Keep sparse weights compressed in memory (CPU).")
    ] = False,
    endpoint: Annotated[
        str | None, typer.Option(help="Ask a running vLLM instead: http://127.0.0.1:8000.", metavar="URL")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: the checkpoint's, or float32 where bf16 is slow.")] = Dtype.auto,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda:1, or auto for all there are.", show_default="the accelerator, or cpu")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions of a task at a time.", min=1)] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write JSON to a file; - prints it.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table to a file.")] = None,
    save: Annotated[
        bool | None,
        typer.Option("--save/--no-save", help="Write elsa_eval.json into DIR.", show_default="if elsa wrote DIR"),
    ] = None,
) -> None:
    """Judge a model: perplexity, agreement with the dense model, and tasks of lm-eval."""
    with errors_in_words(), logs_to_stderr():
        if compare and endpoint:
            raise ValueError("--endpoint is of a server with one model; leave --compare out")
        if dense is not None and no_dense:
            raise ValueError("--dense and --no-dense are both given; leave one out")
        settings: dict[str, Any] = {
            "window": window,
            "windows": windows,
            "dense": dense,
            "compare_with_dense": not no_dense,
            "compressed": compressed,
            "endpoint": endpoint,
            "dtype": dtype.value,
            "device": device,
            "batch_size": batch_size,
        }
        if data or not perplexity:
            settings["data"] = tuple(data or ()) if perplexity else ()
        asked = None if tasks is None else {"limit": limit, "fewshot": fewshot, "include": include_path}
        evaluations = _evaluate([model, *(compare or ())], save, settings, tasks or (), asked)
        from elsa_modifier.whole_files import write_whole

        if json_file is not None and str(json_file) != "-":
            write_whole(json_file, _as_json(evaluations))
        if markdown_file is not None:
            from elsa_modifier.evaluating.tables import markdown

            write_whole(markdown_file, markdown(evaluations))
    if str(json_file) == "-":
        print(_as_json(evaluations), end="")
    else:
        _print(evaluations)


def _evaluate(
    models: list[str], save: bool | None, settings: dict[str, Any], tasks: Sequence[str], asked: dict[str, Any] | None
) -> "list[Evaluation]":
    from elsa_modifier.evaluating.command import Settings, evaluate
    from elsa_modifier.evaluating.models import is_output
    from elsa_modifier.evaluating.tasks import TaskSettings

    if asked is not None:
        names = tuple(name for given in tasks for name in given.split(",") if name)
        settings = settings | {"tasks": TaskSettings(names, **asked)}
    # Before hours of work, not after.
    if save and (missing := [name for name in models if not Path(name).is_dir()]):
        raise ValueError(f"--save writes into the model's directory, and {missing[0]} is none here; leave it out")
    evaluations = []
    for name in models:
        try:
            evaluations.append(evaluate(name, Settings(**settings)))
        except ImportError as error:
            raise ValueError(str(error)) from error
        if save or (save is None and Path(name).is_dir() and is_output(Path(name))):
            evaluations[-1].write(name)
    return evaluations


def _as_json(evaluations: "list[Evaluation]") -> str:
    documents = [evaluation.as_json() for evaluation in evaluations]
    return documents[0] if len(documents) == 1 else "[" + ",".join(documents) + "]\n"


def _print(evaluations: "list[Evaluation]") -> None:
    from elsa_modifier.evaluating.tables import table_of

    contents = table_of(evaluations)
    table = Table(caption=plain(" ".join(contents.notes), 2000))
    for column, name in enumerate(contents.columns):
        table.add_column(plain(name), justify="right" if column else "left", overflow="fold")
    for row in contents.rows:
        table.add_row(*map(plain, row))
    Console().print(table)
