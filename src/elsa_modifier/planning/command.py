"""What ``elsa plan`` does, for the command line to call."""

import json
from pathlib import Path

from elsa_modifier.planning.options import find_remedy
from elsa_modifier.planning.planner import Planner
from elsa_modifier.planning.report import as_json, print_plan
from elsa_modifier.planning.settings import modifier_of_recipe
from elsa_modifier.planning.sources import config_of
from elsa_sparse.errors import printable

__all__ = ["run"]


def run(model: str, recipe: str | Path, *, gpus: int, gpu_memory: float, tflops: float, json_output: bool) -> bool:
    """Print the plan of a run; True if it fits.

    :param model: directory with a ``config.json``, or a name on the hub
    :param recipe: a file, or the name of a recipe that comes with the package
    :param gpu_memory: of each GPU, 10^9 bytes
    :param tflops: what each GPU sustains, 10^12 operations a second
    :raises ValueError: if model or recipe cannot be used, or not together; the message says what to do
    """
    modifier = modifier_of_recipe(recipe)
    config = config_of(model)
    try:
        planner = Planner(config, gpus=gpus, capacity=round(gpu_memory * 1e9), tflops=tflops)
        plan = planner.plan(modifier)
        remedy = None if plan.fits else find_remedy(planner, modifier)
    except ValueError:
        raise
    except Exception as error:  # other people's code, on numbers it was not written for
        reason = printable(f"{type(error).__name__}: {error}", 300)
        raise ValueError(
            f"{printable(model, 300)}: the model's code cannot be run without weights ({reason})"
        ) from error
    if json_output:
        print(json.dumps(as_json(plan, remedy), indent=1))
    else:
        print_plan(plan, remedy, title=f"{model}, {Path(recipe).name}")
    return plan.fits
