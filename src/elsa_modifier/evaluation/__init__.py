"""Measuring what pruning did to a model."""

from elsa_modifier.evaluation.perplexity import perplexity

__all__ = ["perplexity"]
