"""The ``elsa`` command: plan a pruning run and make it; pack, unpack and inspect checkpoints."""

import typer

from elsa_cli.inspecting import inspect
from elsa_cli.packing import pack, unpack
from elsa_cli.planning import plan
from elsa_cli.pruning import prune

__all__ = ["app"]

app = typer.Typer(
    help="Prune a model, or plan it. Sparse checkpoints of pruned models: make them, turn them back, look into them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (prune, plan, pack, unpack, inspect):
    app.command()(_command)
