"""What ``elsa plan`` does, for the command line to call."""

import json
from pathlib import Path

from transformers import AutoConfig

from elsa_modifier.planning.options import find_remedy
from elsa_modifier.planning.planner import Planner
from elsa_modifier.planning.report import as_json, print_plan
from elsa_modifier.planning.settings import modifier_of_recipe

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
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{model} is no model that transformers knows; give a directory with a config.json, or a name on the hub "
            f"({reason})"
        ) from error
    try:
        planner = Planner(config, gpus=gpus, capacity=round(gpu_memory * 1e9), tflops=tflops)
        plan = planner.plan(modifier)
        remedy = None if plan.fits else find_remedy(planner, modifier)
    except RuntimeError as error:
        raise ValueError(f"{model}: the model's code cannot be run without weights ({error})") from error
    if json_output:
        print(json.dumps(as_json(plan, remedy), indent=1))
    else:
        print_plan(plan, remedy, title=f"{model}, {Path(recipe).name}")
    return plan.fits
