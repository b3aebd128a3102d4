"""Pruned SmolLM2-135M checkpoints for the benchmarks that need one, made on the first call."""

import sys
from pathlib import Path

from llmcompressor import oneshot

from benchmarks.assets import ASSETS, model_directory, training_texts
from benchmarks.measuring import BUDGET
from elsa_modifier import ELSAModifier

__all__ = ["pruned_directory"]


def pruned_directory(sparsity: float, **fields: int) -> Path:
    """A dense checkpoint of SmolLM2-135M, pruned by ELSA with the benchmarks' budget or with other fields."""
    budget = BUDGET | fields
    directory = ASSETS / "pruned" / f"elsa-{round(100 * sparsity)}-{budget['steps']}"
    if not directory.exists():
        partial = directory.with_suffix(".partial")
        oneshot(
            model=str(model_directory()),
            dataset=training_texts(),
            recipe=[ELSAModifier(sparsity=sparsity, **budget)],
            output_dir=str(partial),
        )
        partial.rename(directory)
    return directory


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(pruned_directory(float(argument)))
