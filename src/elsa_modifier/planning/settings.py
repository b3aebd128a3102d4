"""The fields of a recipe that decide how much memory a run takes."""

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from llmcompressor.recipe import Recipe

from elsa_modifier.modifier import ELSAModifier

__all__ = ["RunSettings", "modifier_of_recipe"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RunSettings:
    """What memory and time depend on. Names and values are those of the recipe's fields."""

    steps: int
    batch_size: int
    gradient_accumulation_steps: int
    sequence_length: int
    precision: str
    weight_dtype: str
    state_dtype: str
    optimizer: str
    gradient_release: bool
    activation_checkpointing: bool

    @classmethod
    def of(cls, modifier: ELSAModifier, *, sequence_length: int) -> "RunSettings":
        """The settings of a modifier; a field it does not have is at the only value it knows.

        :param sequence_length: tokens in a sequence, at most the model's positions
        """
        return cls(
            steps=modifier.steps,
            batch_size=modifier.batch_size,
            gradient_accumulation_steps=modifier.gradient_accumulation_steps,
            sequence_length=sequence_length,
            precision=modifier.precision,
            weight_dtype=getattr(modifier, "weight_dtype", "fp32"),
            state_dtype=getattr(modifier, "state_dtype", "fp32"),
            optimizer=modifier.optimizer,
            gradient_release=getattr(modifier, "gradient_release", False),
            activation_checkpointing=getattr(modifier, "activation_checkpointing", False),
        )

    @property
    def accumulates(self) -> bool:
        """Whether gradients live from one forward pass to the next."""
        return self.gradient_accumulation_steps > 1

    @property
    def releases_gradients(self) -> bool:
        """Whether a gradient is gone as soon as it is used. One that accumulates cannot be."""
        return self.gradient_release and not self.accumulates

    @property
    def weights(self) -> torch.dtype:
        """Dtype of weights and gradients."""
        return _DTYPES[self.weight_dtype]

    @property
    def compute(self) -> torch.dtype:
        """Dtype of matrix products."""
        return torch.bfloat16 if self.precision == "bf16" else self.weights


def modifier_of_recipe(recipe: Path) -> ELSAModifier:
    """The ELSAModifier of a recipe file.

    :raises ValueError: if the file is no recipe, names an unknown field or value, or has no ELSAModifier
    """
    try:
        modifiers = Recipe.create_instance(str(recipe)).modifiers
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(f"{recipe} is not a recipe that can be used: {error}") from error
    for modifier in modifiers:
        if isinstance(modifier, ELSAModifier):
            return modifier
    raise ValueError(f"{recipe} has no ELSAModifier; add one, as recipes/elsa_90.yaml has it")
