"""What a run will need, in memory and time, from a model's configuration and a recipe alone."""

from elsa_modifier.planning.memory import MemoryPlan
from elsa_modifier.planning.options import Change, Remedy, find_remedy
from elsa_modifier.planning.planner import Plan, Planner
from elsa_modifier.planning.settings import RunSettings, modifier_of_recipe

__all__ = ["Change", "MemoryPlan", "Plan", "Planner", "Remedy", "RunSettings", "find_remedy", "modifier_of_recipe"]
