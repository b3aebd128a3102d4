"""A recipe's modifiers, made anew, at its sparsity or at another."""

from pathlib import Path

from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe

from elsa_modifier.admm.projection import parse_mask_structure
from elsa_modifier.modifier import ELSAModifier
from elsa_modifier.named_recipes import find_recipe
from elsa_modifier.planning.settings import modifier_of_recipe

__all__ = ["modifiers_of"]


def modifiers_of(recipe: str | Path, *, sparsity: float | None = None) -> list[Modifier]:
    """The modifiers of a recipe, in order.

    :param recipe: a file, or the name of a recipe that comes with the package
    :param sparsity: that its ELSAModifier is to have; None for what it says
    :raises ValueError: if the recipe cannot be used, or has no one sparsity that could be another
    """
    first = modifier_of_recipe(recipe)
    modifiers: list[Modifier] = list(Recipe.create_instance(str(find_recipe(recipe))).modifiers)
    if sparsity is None:
        return modifiers
    pruners = [place for place, modifier in enumerate(modifiers) if isinstance(modifier, ELSAModifier)]
    if len(pruners) > 1:
        raise ValueError(f"{recipe} has {len(pruners)} ELSAModifiers, and one can be given another sparsity")
    if not parse_mask_structure(first.mask_structure).is_unstructured:
        raise ValueError(f"{recipe} has mask_structure {first.mask_structure}, whose sparsity is always the same")
    if isinstance(first.sparsity, dict):
        raise ValueError(f"{recipe} has a sparsity for each of some patterns; write one number there")
    modifiers[pruners[0]] = ELSAModifier(**first.model_dump(exclude_unset=True) | {"sparsity": sparsity})
    return modifiers
