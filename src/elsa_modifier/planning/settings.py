"""The fields of a recipe that decide how much memory a run takes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from llmcompressor.recipe import Recipe

from elsa_modifier.admm.penalty import PenaltyForm
from elsa_modifier.admm.storage import StateDtype
from elsa_modifier.fields import TrainingObjective
from elsa_modifier.modifier import ELSAModifier
from elsa_modifier.named_recipes import find_recipe
from elsa_modifier.planning.sources import check_recipe_file
from elsa_modifier.training.model_state import WEIGHT_DTYPES

__all__ = ["RunSettings", "modifier_of_recipe"]


@dataclass(frozen=True)
class RunSettings:
    """What memory and time depend on. Names and values are those of the recipe's fields.

    :param sequence_length: at most the model's positions
    :param objective: whether there is a teacher, and what of it is compared
    :param form: of the penalty
    :param dual: whether the decoupled form has one
    """

    steps: int
    batch_size: int
    gradient_accumulation_steps: int
    sequence_length: int
    precision: str
    weight_dtype: str
    state_dtype: StateDtype
    optimizer: str
    objective: TrainingObjective
    form: PenaltyForm
    dual: bool
    gradient_release: bool
    offload_state: bool
    activation_checkpointing: bool

    @classmethod
    def of(cls, modifier: ELSAModifier, *, sequence_length: int) -> "RunSettings":
        """The settings of a modifier.

        :param sequence_length: tokens in a sequence, at most the model's positions
        """
        return cls(
            steps=modifier.steps,
            batch_size=modifier.batch_size,
            gradient_accumulation_steps=modifier.gradient_accumulation_steps,
            sequence_length=sequence_length,
            precision="bf16" if modifier.precision == "auto" else modifier.precision,
            weight_dtype=modifier.weight_dtype,
            state_dtype=modifier.state_dtype,
            optimizer=modifier.optimizer,
            objective=modifier.objective,
            form=modifier.penalty.form,
            dual=modifier.penalty.dual,
            gradient_release=modifier.gradient_release,
            offload_state=modifier.offload_state,
            activation_checkpointing=modifier.activation_checkpointing,
        )

    @property
    def has_pair(self) -> bool:
        """Whether ``z`` and ``u`` are stored, which takes a dual."""
        return self.form == "coupled" or self.dual

    @property
    def accumulates(self) -> bool:
        """Whether gradients live from one forward pass to the next."""
        return self.gradient_accumulation_steps > 1

    @property
    def weights(self) -> torch.dtype:
        """Dtype of weights and gradients."""
        return WEIGHT_DTYPES[self.weight_dtype]

    @property
    def compute(self) -> torch.dtype:
        """Dtype of matrix products."""
        return torch.bfloat16 if self.precision == "bf16" else self.weights


def modifier_of_recipe(recipe: str | Path) -> ELSAModifier:
    """The ELSAModifier of a recipe.

    :param recipe: a file, or the name of a recipe that comes with the package, such as ``elsa_90``
    :raises ValueError: if there is no such recipe, or it names an unknown field or value, or has no ELSAModifier
    """
    path = find_recipe(recipe)
    try:
        check_recipe_file(path)
        modifiers = Recipe.create_instance(str(path)).modifiers
    except Exception as error:  # in any class, from whichever modifier it names
        reason = str(error) or type(error).__name__
        raise ValueError(f"{recipe} is not a recipe that can be used: {reason}") from error
    for modifier in modifiers:
        if isinstance(modifier, ELSAModifier):
            return modifier
    raise ValueError(f"{recipe} has no ELSAModifier; add one, as the recipe elsa_90 has it")
