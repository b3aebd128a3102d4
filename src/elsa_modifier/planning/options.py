"""Which fields of a recipe would make a run fit."""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from elsa_modifier.modifier import ELSAModifier
from elsa_modifier.planning.planner import Plan, Planner

__all__ = ["Change", "Remedy", "find_remedy"]


@dataclass(frozen=True)
class Change:
    """Fields of a recipe to set.

    :param saves: bytes a GPU that it saves by itself
    """

    fields: dict[str, Any]
    saves: int

    def __str__(self) -> str:
        return ", ".join(f"{name}: {_as_yaml(value)}" for name, value in self.fields.items())


@dataclass(frozen=True)
class Remedy:
    """What would help a run that does not fit.

    :param changes: every one that saves memory by itself
    :param together: those that are needed, or all that help where all are too few
    :param plan: the run with ``together``
    """

    changes: list[Change]
    together: list[Change]
    plan: Plan


def find_remedy(planner: Planner, modifier: ELSAModifier) -> Remedy:
    """Changes to the recipe that make it fit, those that cost least first; fields that it does not have are left out."""
    before = planner.plan(modifier).memory.total
    changes = []
    for fields in _candidates(modifier):
        changed = _changed(modifier, [fields])
        saves = 0 if changed is None else before - planner.plan(changed).memory.total
        if saves > 0:
            changes.append(Change(fields, saves))
    attempts = [_attempt(planner, modifier, changes, without) for without in _EXCLUSIVE]
    # Of two that fit, the one that changes less.
    together, plan = min(attempts, key=lambda a: (not a[1].fits, len(a[0]) if a[1].fits else a[1].memory.total))
    return Remedy(changes, together, plan)


# A gradient that accumulates cannot be released, so one of the two is left out.
_EXCLUSIVE = ("gradient_release", "gradient_accumulation_steps")


def _candidates(modifier: ELSAModifier) -> list[dict[str, Any]]:
    """From no loss but time, to rounding of what the method computes with."""
    smaller_batch = {
        "batch_size": 1,
        "gradient_accumulation_steps": modifier.batch_size * modifier.gradient_accumulation_steps,
    }
    return [
        {"activation_checkpointing": True},
        # Clipping needs all gradients at once.
        {"gradient_release": True, "max_grad_norm": None},
        smaller_batch,
        {"state_dtype": "bf16"},
        {"state_dtype": "int8"},
        {"optimizer": "adam8bit"},
        {"weight_dtype": "bf16"},
        {"optimizer": "adam4bit"},
    ]


def _attempt(
    planner: Planner, modifier: ELSAModifier, changes: list[Change], without: str
) -> tuple[list[Change], Plan]:
    """Changes added in their order until the run fits, less those that turn out not to be needed."""
    together: list[Change] = []
    plan = planner.plan(modifier)
    for change in changes:
        if plan.fits:
            break
        if without in change.fields:
            continue
        longer = [c for c in together if not c.fields.keys() & change.fields.keys()] + [change]
        more = _plan_with(planner, modifier, longer)
        if more is not None and more.memory.total < plan.memory.total:
            together, plan = longer, more
    if plan.fits:
        for change in list(together):
            fewer = [c for c in together if c is not change]
            less = _plan_with(planner, modifier, fewer)
            if less is not None and less.fits:
                together, plan = fewer, less
    return together, plan


def _plan_with(planner: Planner, modifier: ELSAModifier, changes: list[Change]) -> Plan | None:
    changed = _changed(modifier, [change.fields for change in changes])
    return None if changed is None else planner.plan(changed)


def _changed(modifier: ELSAModifier, changes: list[dict[str, Any]]) -> ELSAModifier | None:
    """The modifier with fields set otherwise; None if it does not take them."""
    fields = modifier.model_dump(include=modifier.model_fields_set)
    for change in changes:
        fields |= change
    try:
        return type(modifier)(**fields)
    except ValidationError:
        return None


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
