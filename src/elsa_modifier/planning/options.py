"""Which fields of a recipe would make a run fit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from elsa_modifier.modifier import ELSAModifier
from elsa_modifier.planning.planner import Plan, Planner
from elsa_modifier.training.base_optimizer import LOW_BIT_OPTIMIZERS

__all__ = ["Change", "Remedy", "as_yaml", "find_remedy"]

# A gradient that accumulates cannot be released, so one of the two is left out.
_EXCLUSIVE = ("gradient_release", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Change:
    """Fields of a recipe to set.

    :param saves: bytes a GPU that it saves by itself
    """

    fields: dict[str, Any]
    saves: int


@dataclass(frozen=True)
class Remedy:
    """What would help a run that does not fit.

    :param changes: every one that saves memory by itself
    :param together: the fields that are needed, or all that help where all are too few
    :param plan: the run with ``together``
    """

    changes: list[Change]
    together: dict[str, Any]
    plan: Plan


def find_remedy(planner: Planner, modifier: ELSAModifier) -> Remedy:
    """Changes to the recipe that make it fit, those that cost least first."""
    before = planner.plan(modifier)
    changes = []
    for fields in _candidates(modifier, before.gpus):
        plan = _plan_with(planner, modifier, [fields])
        if plan is not None and plan.memory.total < before.memory.total:
            changes.append(Change(fields, before.memory.total - plan.memory.total))
    attempts = []
    for field in _EXCLUSIVE:
        useful = [change.fields for change in changes if field not in change.fields]
        attempts.append(_attempt(planner, modifier, before, useful))
    # Of two that fit, the one that goes less far down the list.
    costs = [change.fields for change in changes]
    chosen, plan = min(
        attempts,
        key=lambda a: (not a[1].fits, max(map(costs.index, a[0]), default=0) if a[1].fits else a[1].memory.total),
    )
    return Remedy(changes, _merged(chosen), plan)


def as_yaml(fields: dict[str, Any]) -> str:
    """Fields as they stand in a recipe, on one line."""
    return yaml.safe_dump(fields, sort_keys=False, default_flow_style=True, width=10**6).strip().strip("{}")


def _candidates(modifier: ELSAModifier, gpus: int) -> list[dict[str, Any]]:
    """From what costs only time to what rounds numbers that the method computes with."""
    # The same tokens, and the same steps where gradients may accumulate.
    field = "steps" if modifier.gradient_release else "gradient_accumulation_steps"
    smallest = math.gcd(modifier.batch_size, gpus)
    smaller_batch = {"batch_size": smallest, field: getattr(modifier, field) * modifier.batch_size // smallest}
    # Weights in bf16 need an optimizer that rounds stochastically.
    optimizer = {} if modifier.optimizer in LOW_BIT_OPTIMIZERS else {"optimizer": "adam8bit_sr"}
    return [
        {"activation_checkpointing": True},
        # Clipping needs all gradients at once.
        {"gradient_release": True, "max_grad_norm": None},
        smaller_batch,
        # Every step brings moments from main memory and back.
        {"offload_state": True},
        {"state_dtype": "bf16"},
        {"state_dtype": "int8"},
        {"optimizer": "adam8bit_sr"},
        {"weight_dtype": "bf16"} | optimizer,
        {"optimizer": "adam4bit"},
        # No teacher.
        {"objective": "next_token"},
    ]


def _attempt(
    planner: Planner, modifier: ELSAModifier, before: Plan, changes: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], Plan]:
    """Changes added in their order until the run fits, less those that turn out not to be needed."""
    chosen: list[dict[str, Any]] = []
    plan = before
    for change in changes:
        if plan.fits:
            break
        more = _plan_with(planner, modifier, [*chosen, change])
        if more is not None and more.memory.total < plan.memory.total:
            chosen, plan = [*chosen, change], more
    if plan.fits:
        for change in list(chosen):
            fewer = [c for c in chosen if c is not change]
            less = _plan_with(planner, modifier, fewer)
            if less is not None and less.fits:
                chosen, plan = fewer, less
    return chosen, plan


def _plan_with(planner: Planner, modifier: ELSAModifier, changes: Sequence[dict[str, Any]]) -> Plan | None:
    """The plan with fields set otherwise; None if modifier or model does not take them."""
    fields = modifier.model_dump(include=modifier.model_fields_set) | _merged(changes)
    try:
        return planner.plan(type(modifier)(**fields))
    except ValueError:
        return None


def _merged(changes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fields of all changes; of those that set the same, the last counts."""
    return {name: value for change in changes for name, value in change.items()}
