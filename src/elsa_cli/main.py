"""The ``elsa`` command: plan a pruning run, make, judge and report it; pack, unpack, inspect, bench checkpoints."""

import typer

from elsa_cli.benching import bench
from elsa_cli.evaluating import evaluate
from elsa_cli.inspecting import inspect
from elsa_cli.lm_evaluating import SETTINGS, lm_eval
from elsa_cli.packing import pack, unpack
from elsa_cli.planning import plan
from elsa_cli.pruning import prune
from elsa_cli.reporting import report
from elsa_cli.several import several
from elsa_cli.sweeping import sweep

__all__ = ["app"]

app = typer.Typer(
    help="Prune a model, plan it, judge it, show what has come of it. Sparse checkpoints of pruned models: make them, "
    "turn them back, look into them, measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (prune, plan, report, pack, unpack, inspect, bench):
    app.command()(_command)
app.command(cls=several("--sparsities", "--evaluate", "--tasks"))(sweep)
app.command("eval", cls=several("--compare", "--data", "--tasks"))(evaluate)
app.command("lm-eval", context_settings=SETTINGS)(lm_eval)
