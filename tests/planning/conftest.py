"""A modifier with every field that the plan knows, in recipes as ELSAModifier."""

from typing import Literal

import pytest
from llmcompressor.modifiers.factory import ModifierFactory

from elsa_modifier import ELSAModifier


class LeanModifier(ELSAModifier):
    """ELSAModifier with the fields that save memory."""

    state_dtype: Literal["fp32", "bf16", "float8_e4m3fn", "float8_e5m2", "int8"] = "fp32"
    weight_dtype: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["adam", "adamw", "adam8bit", "adam4bit", "adamfp8"] = "adam"
    gradient_release: bool = False
    activation_checkpointing: bool = False


@pytest.fixture
def lean_recipes(monkeypatch):
    """Recipes in the body of the test may name these fields."""
    monkeypatch.setitem(ModifierFactory._registered_registry, "ELSAModifier", LeanModifier)
