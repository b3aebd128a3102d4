"""Sparsities of a sweep, looked at before the first run: as numbers, in the recipe, and in the model."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from elsa_modifier.modifier import ELSAModifier
from elsa_modifier.planning.sources import config_of
from elsa_modifier.pruning.recipes import modifiers_of
from elsa_sparse.errors import printable

__all__ = ["check_sparsities", "parse_sparsities"]


def parse_sparsities(values: Sequence[str]) -> list[float]:
    """Fractions of zeros, rising, each once.

    :param values: percentages above 1 (``50``, ``97.5``, ``50%``), or fractions below 1 (``0.5``)
    :raises ValueError: names the value
    """
    found = set()
    for value in values:
        try:
            number = float(value.rstrip("%"))
        except ValueError as error:
            raise ValueError(f"sparsities: {printable(value, 50)} is no number; give some such as 50 60 70") from error
        fraction = number if number < 1 and "%" not in value else round(number / 100, 12)
        if not 0 < fraction < 1 or number == 1:
            raise ValueError(
                f"sparsities: {printable(value, 50)} is not one; allowed are percentages above 1 and below 100, and "
                "fractions between 0 and 1"
            )
        found.add(fraction)
    if not found:
        raise ValueError("sparsities: there are none; give some such as 50 60 70")
    return sorted(found)


def check_sparsities(model: str, recipe: str | Path, sparsities: Sequence[float]) -> None:
    """Have every sparsity tried on the recipe and on the model's shapes; no weights are read.

    :param model: directory or name
    :raises ValueError: names the first that will not do, and why
    """
    config = config_of(model)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    for sparsity in sparsities:
        try:
            [modifier] = [m for m in modifiers_of(recipe, sparsity=sparsity) if isinstance(m, ELSAModifier)]
            modifier.targets_in(shapes)
        except ValueError as error:
            raise ValueError(f"sparsities: {100 * sparsity:g}% will not do: {error}") from error
