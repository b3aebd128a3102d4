"""The ``elsa`` command: pack, unpack, inspect and bench checkpoints; plan a run."""

import typer

from elsa_cli.benching import bench
from elsa_cli.inspecting import inspect
from elsa_cli.packing import pack, unpack
from elsa_cli.planning import plan

__all__ = ["app"]

app = typer.Typer(
    help="Sparse checkpoints of pruned models: make them, turn them back, look into them, measure them. And plan a "
    "pruning run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (pack, unpack, inspect, bench, plan):
    app.command()(_command)
